"""Docstrings of this library as Sphinx takes them: lists of fields, absolute values, one signature for each call."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

from sphinx.pycode.parser import VariableCommentPicker

if TYPE_CHECKING:
    from sphinx.application import Sphinx

# what files and tables are made of, for which a reader of the reference has no use
INTERNAL = {"columns", "layer_text", "metadata", "n_extras", "restore", "rows", "scores_of", "tensors"}
MADE_BY_HAND = ("components", "engine", "inputs", "options")  # rooms whose classes a user makes; others are returned
_FIELD = re.compile(r"[a-z_]\w*: \S")
_BAR = re.compile(r"(``.*?``|`.*?`)|(\|)")


def prepare(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turn lists of `field: text` into a section of attributes, escape bars, add a class's fields with their types."""
    text = "\n".join("\n".join(_paragraph(part)) for part in re.split(r"\n\s*\n", "\n".join(lines)))
    lines[:] = _BAR.sub(lambda match: match[1] or r"\|", text).splitlines()
    if what == "property":
        lines.insert(0, "\\")  # nothing in print; else napoleon takes what stands before a colon for the type
    if what == "class" and _returned(obj) and dataclasses.is_dataclass(obj):
        fields = [
            f"``{field.name}`` *{_short(field.type)}*" for field in dataclasses.fields(obj) if field.name[0] != "_"
        ]
        lines += ["", "Fields: " + ", ".join(fields), ""]


def _paragraph(part: str) -> list[str]:
    lines = part.splitlines()
    outer = [line for line in lines if not line.startswith(" ")]
    if len(outer) > 1 and lines[0] == outer[0] and all(_FIELD.match(line) for line in outer):
        return ["Attributes:", *(f"    {line}" for line in lines), ""]
    return [*lines, ""]


def _short(annotation: Any) -> str:
    return str(annotation).replace("*", "").replace("|", r"\|")


def _returned(obj: Any) -> bool:
    parts = getattr(obj, "__module__", "").split(".")
    return parts[0] == "depass_fast" and parts[1] not in MADE_BY_HAND


def bare(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str, returned: str
) -> tuple[str, str] | None:
    """Leave out the signature of a class that is returned and not made."""
    return ("", "") if what == "class" and _returned(obj) else None


def skip(app: Sphinx, what: str, name: str, obj: Any, skipped: bool, options: Any) -> bool | None:
    """Leave out what is public for other rooms alone."""
    return True if name in INTERNAL else None


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    # overloads tell type checkers what comes back; a reader has the docstring, and one signature
    VariableCommentPicker.add_overload_entry = lambda self, func: None
    app.connect("autodoc-process-docstring", prepare, priority=400)  # before napoleon
    app.connect("autodoc-process-signature", bare)
    app.connect("autodoc-skip-member", skip)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
