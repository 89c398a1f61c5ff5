"""A page's data: one sheet for each target, and its views. Everything is plain values, ready for JSON.

A view is a dictionary with a ``kind``, which names the script that draws it (the files page/view_*.js), and an ``id``.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..labels import shown_tokens, text_of_tokens, with_signs
from .units import Group

FORMAT = "depass_fast.report.v1"
_LONGEST = 180  # characters of a prompt in a picture
FROZEN = "Attention is frozen: shares say what was carried, not why heads looked there."


@dataclass
class Sheet:
    """The shares in one target of one prompt.

    ``value`` is the model's own number that the shares sum to, ``unit`` what a whole number of the views stands for.
    ``what`` names the value ("logit"), ``about`` says how the scores came about, ``warnings`` where they are not to be
    relied upon, ``notes`` what is to be known when they are read. ``tokens`` are the prompt's, ``position`` (-1: none)
    is where it was read. ``own_sums`` says what layers sum up to, where that is not ``value``.
    """

    name: str
    headline: str
    target: str
    what: str
    value: float
    unit: float
    error: float
    exact: bool
    about: str
    tokens: Sequence[str]
    position: int
    warnings: Sequence[str] = ()
    notes: Sequence[str] = (FROZEN,)
    made_with: str | None = None
    own_sums: str | None = None
    views: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name, self.headline, self.target = map(with_signs, (self.name, self.headline, self.target))

    @property
    def direction(self) -> str:
        """The direction in which the prompt is written, "rtl" where most of its letters are."""
        kinds = [unicodedata.bidirectional(c) for token in shown_tokens(self.tokens) for c in token]
        return "rtl" if sum(kind in ("R", "AL") for kind in kinds) > kinds.count("L") else "ltr"

    @property
    def shown(self) -> dict[int, str]:
        """The texts of tokens that are parts of characters, as they are shown, by position."""
        each = enumerate(zip(shown_tokens(self.tokens), self.tokens, strict=True))
        return {n: text for n, (text, token) in each if text != token}

    @property
    def excerpt(self) -> str:
        """The prompt, and of a long one its beginning and its end, as pictures that are saved name it."""
        text = text_of_tokens(self.tokens)
        return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 3]} … {text[-_LONGEST * 2 // 3 :]}"

    def plain(self) -> dict[str, Any]:
        """Return the sheet as JSON holds it."""
        return {
            "name": self.name,
            "headline": self.headline,
            "target": self.target,
            "what": self.what,
            "value": self.value,
            "unit": self.unit,
            "error": self.error,
            "exact": self.exact,
            "about": self.about,
            "tokens": list(self.tokens),
            "excerpt": self.excerpt,
            "direction": self.direction,
            "position": self.position,
            "warnings": list(self.warnings),
            "notes": list(self.notes),
            "made_with": self.made_with,
            "own_sums": self.own_sums,
            "shown": self.shown,
            "views": self.views,
        }


def tokens_view(group: Group, positions: Sequence[int]) -> dict[str, Any]:
    """Return the prompt's tokens with their shares; ``positions`` are those of the group's rows."""
    plain = group.plain()
    rows = [[position, number] for position, (_, number) in zip(positions, group.rows, strict=True)]
    return {"kind": "tokens", "id": "tokens", "group": {**plain, "rows": rows}}


def components_view(
    name: str, title: str, groups: Sequence[Group], more: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return a table of components: a group for each layer, or a single one. ``more`` is what a script reads besides.

    ``name`` is the kind of the components, and the view's id; that of tokens is another than the prompt's.
    """
    return {
        "kind": "components",
        "id": "all-tokens" if name == "tokens" else name,
        "title": title,
        "groups": [group.plain() for group in groups],
        **(more or {}),
    }
