"""Pages of reports: what is in a file, and results with tokens of one's own."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from depass_fast import Attribution, DePass, Tokens
from depass_fast.demo import load_demo

PROMPT, TARGET = "When Diane met Grace at the park, Grace handed the camera to", " Diane"

needs_pages = pytest.mark.skipif(find_spec("vl_convert") is None, reason="needs the extra report: vl-convert-python")

HOSTILE = [
    "<script>alert(1)</script>",
    "</script>",
    "&amp;",
    '"',
    "'",
    "\u2028",
    "\u2029",
    "<!--",
    "`${1}`",
    "\x00",
    "\n",
]

SPLIT = [" <0xE7><0x8E>", "<0x9B>", "和", "<0xE2><0x80>", "<0x8D>", "\n", " "]  # tokens that are parts of characters

LANGUAGES = {
    "Arabic": ["ذهبت", " مريم", " إلى", " المتجر"],
    "Chinese": ["玛丽", "和", "约翰", "去", "商店"],
    "Hindi": ["मैरी", " और", " जॉन", " दुकान"],
    "Russian": ["Мария", " и", " Иван", " пошли"],
    "emoji": ["👩‍🚀", " 🚀", "🏳️‍🌈", " ok"],
}


@lru_cache(maxsize=1)
def demo() -> DePass:
    return DePass(*load_demo())


def with_tokens(tokens: Sequence[str], **changes: Any) -> Attribution:
    """A result of the demo model, on as many tokens, that are called otherwise."""
    result = demo().attribute(list(range(10, 10 + len(tokens))), Tokens(), 7)
    labels = [f"{token!r}@{n}" for n, token in enumerate(tokens)]
    names = [repr(tokens[0])]
    return replace(result, tokens=list(tokens), labels=labels, target_names=names, **changes)


def data_of(path: Path) -> dict[str, Any]:
    """The data of a page, as its scripts read it."""
    (text,) = re.findall(
        r'<script type="application/json" id="data">(.*?)</script>', path.read_text("utf-8"), re.DOTALL
    )
    return json.loads(text)


def view_of(sheet: dict[str, Any], name: str) -> dict[str, Any]:
    return next(view for view in sheet["views"] if view["id"] == name)


def saved(opened: Any, selector: str) -> bytes:
    """Click on a button of a page and return what it downloads."""
    with opened.expect_download() as found:
        opened.click(selector)
    return Path(found.value.path()).read_bytes()


def units(opened: Any, selector: str) -> list[int]:
    """The numbers of a page's cells, in units."""
    return [int(one.get_attribute("data-units")) for one in opened.query_selector_all(selector)]


def sums_of(sheet: dict[str, Any]) -> Iterator[tuple[str, int, int]]:
    """The views' sums: of what, what the rows add up to with all that belongs to them, and what is said."""
    for view in sheet["views"]:
        groups = view.get("groups") or ([view["group"]] if view["id"] == "tokens" else [])
        for group in groups:
            rows = sum(number for _, number in group["rows"])
            yield f"{view['id']} {group['layer']}", rows + _behind(group), group["total"]
        for part in view.get("parts", ()):
            for row in part["rows"]:
                yield f"{part['name']} {row['layer']}", sum(row["cells"]) + _behind(row), row["total"]


def _behind(group: dict[str, Any]) -> int:
    return group["others"][1] + (group["rest"] or 0) + (group["bias"] or 0)
