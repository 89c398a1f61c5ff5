"""The page of the command line: what `--help` of depass-fast and of each of its commands prints."""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depass_fast.cli.main import main

if TYPE_CHECKING:
    from sphinx.application import Sphinx

PAGE = Path(__file__).parents[1] / "generated/commands.md"
WIDTH = "108"  # characters of a line, which the page has room for
INTRODUCTION = "What `--help` prints for `depass-fast` and for each of its commands ([guide](../api.md#command-line))."


def help_of(*words: str) -> str:
    """Return what `depass-fast WORDS --help` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        main([*words, "--help"])
    return printed.getvalue().rstrip()


def page() -> str:
    """Return the page as Markdown; the commands are those that the first help names in braces."""
    first = help_of()
    names = re.search(r"\{([\w,-]+)\}", first)[1].split(",")
    parts = ["# Command line", INTRODUCTION, f"```text\n{first}\n```"]
    for name in names:
        parts += [f"## depass-fast {name}", f"```text\n{help_of(name)}\n```"]
    return "\n\n".join(parts) + "\n"


def write(*_: Any) -> None:
    """Write the page where it has changed."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = WIDTH
    try:
        text = page()
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    PAGE.parent.mkdir(exist_ok=True)
    if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        PAGE.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("config-inited", write)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
