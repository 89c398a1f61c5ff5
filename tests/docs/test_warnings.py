"""docs/warnings.md names every category of warnings, in tables of one shape, a section each."""

import re
from pathlib import Path

import depass_fast

TEXT = (Path(__file__).parents[2] / "docs" / "warnings.md").read_text(encoding="utf-8")
COLUMNS = "| what is met | what happens | why | what to do |"


def test_every_category_has_a_row():
    categories = {name for name in depass_fast.__all__ if name.endswith("Warning")}
    assert categories and categories | {"RuntimeWarning"} == set(re.findall(r"\w+Warning\b", TEXT))


def test_every_section_is_linked_and_holds_one_table():
    titles = re.findall(r"^## (.+)$", TEXT, re.MULTILINE)
    links = [title for title, _ in re.findall(r"^- \[(.+)\]\(#(.+)\)$", TEXT, re.MULTILINE)]
    assert titles == links
    for section in TEXT.split("\n## ")[1:]:
        rows = [line for line in section.splitlines() if line.startswith("|")]
        assert rows[0] == COLUMNS and all(len(row.split(" | ")) == 4 for row in rows if not row.startswith("|-"))


def test_no_row_is_there_twice():
    met = [line.split(" | ")[0] for line in TEXT.splitlines() if line.startswith("| ") and line != COLUMNS]
    assert len(set(met)) == len(met)
