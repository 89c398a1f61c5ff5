"""The small picture of sheets: HTML without scripts, for notebooks and for a page whose scripts do not run."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..labels import shown_tokens
from .sheet import Sheet

_QUOTED = re.compile(r"""(['"])((?:(?!\1).)*)\1""", re.DOTALL)
_TOKENS, _ROWS = 128, 12  # that are shown
_STRONGEST = 0.62  # opacity of the largest share's colour
_POSITIVE, _NEGATIVE = "217,96,10", "36,104,180"  # those of style.css


def fragment(sheets: Sequence[Sheet], more: int = 0) -> str:
    """Return the tokens and the leading rows of some sheets; ``more`` is how many others there are.

    Raises:
        ImportError: jinja2 is not installed.
    """
    return environment().get_template("fragment.html.j2").render(sheets=list(map(_shown, sheets)), more=more)


@lru_cache(maxsize=1)
def environment() -> Any:
    """Return the templates' environment, which escapes all that is put into them.

    Raises:
        ImportError: jinja2 is not installed.
    """
    try:
        import jinja2
    except ModuleNotFoundError as error:
        if error.name != "jinja2":
            raise
        raise ImportError("to_html: jinja2 is not installed; pip install 'depass-fast[report]'.") from error
    folder = jinja2.FileSystemLoader(Path(__file__).parent / "page")
    return jinja2.Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)


def _shown(sheet: Sheet) -> dict[str, Any]:
    """Return what the template shows of a sheet."""
    views = {view["kind"]: view for view in reversed(sheet.views)}  # the first of each kind
    strip = views.get("tokens", {"group": {"rows": []}})
    shares, unit, word = dict(strip["group"]["rows"]), strip.get("unit", sheet.unit), strip.get("word")
    largest = max(map(abs, shares.values()), default=0)
    tokens = [
        {
            "text": visible(text),
            "share": _number(shares.get(n), largest, unit),
            "colour": _colour(shares.get(n), largest),
        }
        for n, text in enumerate(shown_tokens(sheet.tokens)[:_TOKENS])
    ]
    table = views.get("components") or views.get("graph") or _first_key(views.get("keys"))
    return {
        "sheet": sheet,
        "headline": isolated(sheet.headline),
        "tokens": tokens,
        "cut": max(0, len(sheet.tokens) - _TOKENS),
        "rows": []
        if table is None or (table["id"] == "all-tokens" and len(sheet.tokens) <= _TOKENS)
        else _rows(table, sheet),
        "title": None if table is None else table.get("listed", table["title"]),
        "total": None if not shares or word else _number(views["tokens"]["group"]["total"], largest, sheet.unit),
    }


def _first_key(keys: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the leading key's components as a table of components."""
    if keys is None:
        return None
    return {**keys, "title": f"{keys['title']}: {keys['groups'][0]['name']}", "groups": keys["groups"][:1]}


def _rows(table: dict[str, Any], sheet: Sheet) -> list[dict[str, Any]]:
    """Return the leading rows of a table; of a single group also what belongs to its sum."""
    rows = sorted((row for group in table["groups"] for row in group["rows"]), key=lambda row: -abs(row[1]))
    shown = rows[:_ROWS]
    largest = max((abs(number) for _, number in shown), default=0)
    ends = min((number for _, number in shown), default=0), max((number for _, number in shown), default=0)
    found = [(label, number) for label, number in shown]
    if len(table["groups"]) == 1:
        (group,) = table["groups"]
        others = group["others"][1] + sum(number for _, number in rows[_ROWS:])
        count = group["others"][0] + len(rows[_ROWS:])
        found += [(f"{count:,} {'other' if count == 1 else 'others'}", others)] if count else []
        found += [(name, group[name]) for name in ("rest", "bias") if group[name] is not None]
        found += [("sum", group["total"])]
    return [
        {
            "label": isolated(visible(label)),
            "share": _number(number, largest, sheet.unit),
            "bar": _bar(number, *ends) if place < len(shown) else None,
        }
        for place, (label, number) in enumerate(found)
    ]


def _bar(number: int, lowest: int, highest: int) -> dict[str, Any]:
    """Return a bar that begins at zero: its start and length in percent of an axis that holds all of them."""
    low = min(0, lowest)
    room = max(0, highest) - low or 1
    start, end = sorted((-low, number - low))
    return {
        "start": round(100 * start / room, 1),
        "length": round(100 * (end - start) / room, 1),
        "colour": f"rgb({_POSITIVE if number > 0 else _NEGATIVE})",
    }


def visible(text: str) -> str:
    """Return a text with line breaks and other characters that nobody sees escaped."""
    if text and not text.strip(" "):
        return "␣" * len(text)
    if text and all(unicodedata.category(c)[0] == "M" and not "\ufe00" <= c <= "\ufe0f" for c in text):
        return f"◌{text}"
    return "".join(c if c.isprintable() else {"\n": "⏎", "\t": "⇥"}.get(c, repr(c)[1:-1]) for c in text) or "∅"


def isolated(text: str) -> str:
    """Return a text whose quoted parts do not change the order of what stands around them, whatever their script."""
    if not any(unicodedata.bidirectional(c) in ("R", "AL") for c in text):
        return text
    return _QUOTED.sub("\\1\u2068\\2\u2069\\1", text)


def _number(units: int | None, largest: int, unit: float) -> str:
    """Return a number of units with the decimals that the largest one needs for four digits, and the unit has."""
    if units is None:
        return ""
    size = largest * unit
    wanted = 3 - math.floor(math.log10(size)) if size else 3
    decimals = max(0, min(9, round(-math.log10(unit)), wanted))
    text = f"{units * unit:+.{decimals}f}"
    return text if re.search("[1-9]", text) else text[1:]


def _colour(units: int | None, largest: int) -> str:
    """Return the background of a share: orange where positive, blue where negative, the stronger the larger."""
    if not units or not largest:
        return "transparent"
    strength = _STRONGEST * min(1.0, math.sqrt(abs(units) / largest))
    return f"rgba({_POSITIVE if units > 0 else _NEGATIVE},{strength:.2f})"
