"""The code's own prose tells the truth: what docstrings and comments name exists, be it code or a file."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
ROLE = re.compile(r":(?:mod|class|func|meth|attr|data):`~?([\w.]+)`")
PATH = re.compile(r"(?<![\w/.])((?:bench|depass_fast|docs|kernels|tests)/[\w./*-]*\w)")


def files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def docstrings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""


def comments(path: Path) -> Iterator[str]:
    with tokenize.open(path) as lines:
        yield from (
            token.string for token in tokenize.generate_tokens(lines.readline) if token.type == tokenize.COMMENT
        )


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(name: str) -> object | None:
    """The module, or the member of one, that a dotted name leads to; None where it leads nowhere."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        return member(found, parts[count:])
    return None


def member(found: object, parts: list[str]) -> object | None:
    """A member of a member; fields without a default and annotated names count."""
    for part in parts:
        if not hasattr(found, part):
            return found if part in getattr(found, "__annotations__", {}) else None
        found = getattr(found, part)
    return found


def resolves(name: str, module: ModuleType, is_package: bool) -> bool:
    """True if a name leads somewhere: absolutely, relatively, in the module, or in one of its classes."""
    package = module.__name__ if is_package else module.__name__.rpartition(".")[0]
    if name.startswith("."):
        return imported(package + name) is not None
    if name.split(".")[0] in ("depass_fast", "bench"):
        return imported(name) is not None
    places = [module, *(value for value in vars(module).values() if inspect.isclass(value))]
    return any(member(place, name.split(".")) is not None for place in places)


@pytest.mark.parametrize("path", files("depass_fast", "bench"), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_roles_in_docstrings_lead_somewhere(path):
    names = [name for text in docstrings(path) for name in ROLE.findall(text)]
    if not names:
        return
    try:
        module = importlib.import_module(module_name(path))
    except ModuleNotFoundError as error:
        if str(error.name).startswith(("depass_fast", "bench")):
            raise
        pytest.skip(f"{error.name} is not installed")
    wrong = [name for name in names if not resolves(name, module, path.name == "__init__.py")]
    assert not wrong


def test_paths_in_docstrings_and_comments_lead_somewhere():
    wrong = [
        f"{path.relative_to(ROOT).as_posix()}: {name}"
        for path in files("depass_fast", "bench", "tests")
        for text in (*docstrings(path), *comments(path))
        for name in PATH.findall(text)
        if not any(ROOT.glob(name))
    ]
    assert not wrong, "\n".join(wrong)


def test_a_name_that_leads_nowhere_is_noticed():
    layout = importlib.import_module("depass_fast.state.layout")
    assert resolves("Layout.of", layout, False) and resolves(".state", layout, False)
    assert resolves("depass_fast.DePass.attribute", layout, False)
    for wrong in ("Layout.nothing", ".nothing", "depass_fast.DePass.nothing", "depass_fast.nothing", "nothing"):
        assert not resolves(wrong, layout, False)
