"""The rules of the house: imports go one way, files are short, docstrings say what a thing is, one module knows DePass.

Every import counts: those inside functions and those for type checkers, too.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LONGEST, WIDEST = 400, 120  # lines of a file, characters of a line of a page's scripts and styles
QUESTIONS = ("Of", "As", "What", "Whether", "Which", "Where", "How")  # a docstring begins with none of these
KNOW_DEPASS = ("depass_fast", "engine", "cli", "demo", "evaluate", "inseq")  # rooms that may import the facade


def modules(root: Path) -> dict[str, Path]:
    """Every module of depass_fast by its name."""
    found = {}
    for path in sorted((root / "depass_fast").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path) -> Iterator[tuple[str, str | None]]:
    """The imports of a module: (module, None), or (module, what is taken from it), with relative names resolved."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((base, alias.name) for alias in node.names)


def import_graph(root: Path) -> dict[str, set[str]]:
    """The modules that each module imports; a package's ``__init__`` counts where a name is taken from it."""
    known = modules(root)
    graph: dict[str, set[str]] = {}
    for name, path in known.items():
        targets = (f"{base}.{taken}" if f"{base}.{taken}" in known else base for base, taken in imports(name, path))
        graph[name] = {target for target in targets if target in known} - {name}
    return graph


def room(module: str) -> str:
    """The folder of a module below depass_fast; a file at the top is a room of its own."""
    return module.split(".")[1] if "." in module else module


def room_graph(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    rooms: dict[str, set[str]] = {room(module): set() for module in graph}
    for module, targets in graph.items():
        rooms[room(module)] |= {room(target) for target in targets} - {room(module)}
    return rooms


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A circle in a graph, its first node repeated at the end; empty if there is none."""
    done: set[str] = set()

    def walk(node: str, way: list[str]) -> list[str]:
        if node in way:
            return [*way[way.index(node) :], node]
        if node not in done:
            for target in sorted(graph[node]):
                if found := walk(target, [*way, node]):
                    return found
            done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := walk(node, []))), [])


def python_files(root: Path) -> list[Path]:
    """The Python files of the library, the benchmarks and the tests."""
    return [path for folder in ("depass_fast", "bench", "tests") for path in sorted((root / folder).rglob("*.py"))]


def page_files(root: Path) -> list[Path]:
    """The scripts and styles of reports' pages."""
    folder = root / "depass_fast" / "report" / "page"
    return sorted([*folder.glob("*.js"), *folder.glob("*.css")])


def long_files(root: Path) -> list[str]:
    lengths = {
        path.relative_to(root).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for path in [*python_files(root), *page_files(root)]
    }
    return [f"{path}: {length} lines" for path, length in lengths.items() if length > LONGEST]


def wide_lines(root: Path) -> list[str]:
    """Lines of scripts and styles that are too long; those of Python are ruff's."""
    return [
        f"{path.relative_to(root).as_posix()}:{number}: {len(line)} characters"
        for path in page_files(root)
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > WIDEST
    ]


def questioning_docstrings(root: Path) -> list[str]:
    """Docstrings that begin with a question word or a bare preposition."""
    found = []
    for path in python_files(root):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                words = (ast.get_docstring(node) or "").split()
                if words and words[0].rstrip(",:") in QUESTIONS:
                    line = 1 if isinstance(node, ast.Module) else node.lineno
                    found.append(f"{path.relative_to(root).as_posix()}:{line}: {' '.join(words[:5])}")
    return found


def who_knows_depass(root: Path) -> list[str]:
    """Modules that import the facade though they are none of the rooms that may."""
    return [
        f"{name} imports {taken or base}"
        for name, path in modules(root).items()
        if room(name) not in KNOW_DEPASS
        for base, taken in imports(name, path)
        if taken == "DePass" or base == "depass_fast.engine" or (base, taken) == ("depass_fast", "engine")
    ]


def test_no_circle_of_files():
    found = circle(import_graph(ROOT))
    assert not found, " -> ".join(found)


def test_no_circle_of_rooms():
    graph = import_graph(ROOT)
    found = circle(room_graph(graph))
    steps = list(itertools.pairwise(found))
    guilty = [f"{a} imports {b}" for a in graph for b in sorted(graph[a]) if (room(a), room(b)) in steps]
    assert not found, "\n".join([" -> ".join(found), *guilty])


@pytest.mark.parametrize("faults", [long_files, wide_lines, questioning_docstrings, who_knows_depass])
def test_the_rules_of_the_house(faults):
    found = faults(ROOT)
    assert not found, "\n".join(found)


def test_every_module_is_walked():
    graph = import_graph(ROOT)
    assert {"depass_fast", "depass_fast.engine", "depass_fast.kernels.rows", "depass_fast.demo.text"} <= set(graph)
    assert "depass_fast.engine" in graph["depass_fast"] and "depass_fast.cli.main" in graph["depass_fast.__main__"]


# -- a house with every fault ---------------------------------------------------------------------------------------

BAD_HOUSE = {
    "depass_fast/__init__.py": "from .engine import DePass",
    "depass_fast/engine.py": "from . import record\n\nclass DePass:\n    'What it is.'",
    "depass_fast/record.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import DePass",
    "depass_fast/state/__init__.py": "",
    "depass_fast/state/layout.py": "def rows():\n    'Where rows are.'\n    from ..trace.size import bytes",
    "depass_fast/trace/__init__.py": "",
    "depass_fast/trace/size.py": "'The size of a trace.'\nimport depass_fast.state.layout",
    "depass_fast/report/page/wide.js": "// " + "x" * WIDEST,
    "depass_fast/report/page/long.css": "\n" * (LONGEST + 1),
    "bench/long.py": "x = 1\n" * (LONGEST + 1),
    "tests/short.py": "'How short it is.'\n" + "x = 1\n" * (LONGEST - 1),
}


def test_every_fault_is_found(tmp_path):
    for name, text in BAD_HOUSE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    graph = import_graph(tmp_path)
    facade = ["depass_fast", "engine", "record"]
    assert circle(graph) == ["depass_fast", "depass_fast.engine", "depass_fast.record", "depass_fast"]
    assert circle(room_graph(graph)) == [*facade, "depass_fast"]
    others = {module: targets for module, targets in graph.items() if room(module) not in facade}
    assert circle(others) == ["depass_fast.state.layout", "depass_fast.trace.size", "depass_fast.state.layout"]
    assert circle(room_graph(others)) == ["state", "trace", "state"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert long_files(tmp_path) == [
        f"{name}: {LONGEST + 1} lines" for name in ("bench/long.py", "depass_fast/report/page/long.css")
    ]
    assert wide_lines(tmp_path) == [f"depass_fast/report/page/wide.js:1: {WIDEST + 3} characters"]
    assert questioning_docstrings(tmp_path) == [
        "depass_fast/engine.py:3: What it is.",
        "depass_fast/state/layout.py:1: Where rows are.",
        "tests/short.py:1: How short it is.",
    ]
    assert who_knows_depass(tmp_path) == ["depass_fast.record imports DePass"]
