"""The rooms of bench import in one direction."""

import ast
from pathlib import Path

import bench

ROOMS = ("core", "baselines", "kernels", "memory", "speed", "studies", "report")
ROOT = Path(bench.__file__).parent


def imported(path: Path, root: Path = ROOT) -> set[str]:
    """The rooms that a file imports, anywhere in it."""
    package = ("bench", *path.relative_to(root).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            home = list(package[: len(package) - node.level + 1]) if node.level else []
            names = [[*home, *(node.module.split(".") if node.module else []), alias.name] for alias in node.names]
        else:
            continue
        found |= {room for name in names if name[0] == "bench" for room in name[1:2] if room in ROOMS}
    return found


def test_a_room_imports_only_those_before_it():
    assert {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()} == set(ROOMS)
    for place, room in enumerate(ROOMS):
        for path in (ROOT / room).rglob("*.py"):
            assert imported(path) <= set(ROOMS[: place + 1]), path


def test_imports_are_seen(tmp_path):
    file = tmp_path / "speed" / "gpu" / "some.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "from ...core.models import x\nfrom ... import memory\nfrom . import y\ndef f():\n    import bench.report\n"
    )
    assert imported(file, tmp_path) == {"core", "memory", "speed", "report"}
