"""The plan of the house in docs/DESIGN.md names every room of the package, and no other."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_room_is_in_the_plan():
    page = (ROOT / "docs/DESIGN.md").read_text(encoding="utf-8")
    plan = re.search(r"^## 7\. The house\n.*?^```\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[1]
    named = re.findall(r"^(\S+) ", plan, re.MULTILINE)
    package = ROOT / "depass_fast"
    rooms = [f"{path.name}/" for path in package.iterdir() if path.is_dir() and path.name[0] not in "_."]
    files = [path.name for path in package.glob("*.py") if path.name[0] != "_"]
    assert sorted(named) == sorted(rooms + files)
