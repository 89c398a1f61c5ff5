"""Words in pictures: characters that no font holds are escaped, long labels are cut."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from ..runtime.brief import cut

_RAQM = (3, 11)  # from here on matplotlib shapes text: before, right-to-left and Indic scripts come out wrong
LONGEST = 22  # characters of a label


def fitting(texts: Sequence[str], longest: int | None = None) -> tuple[list[str], list[str]]:
    """Return texts as they can be drawn, and the font families to draw them with.

    A character that the user's fonts lack is drawn with another installed font. What none of them holds is escaped as
    ``\\u65e5``, and so are invisible characters. Nothing is warned of. Texts longer than ``longest`` are cut.
    """
    families = _families()
    lacking = _lacking("".join(dict.fromkeys("".join(texts))), tuple(families))
    others, escaped = _others(lacking)
    kept = texts if longest is None else [cut(text, longest) for text in texts]
    return ["".join(_drawn(c, escaped) for c in text) for text in kept], [*families, *others]


def _drawn(character: str, escaped: frozenset[str]) -> str:
    if character == "\n":
        return character
    if not character.isprintable():
        return repr(character)[1:-1]
    return character.encode("ascii", "backslashreplace").decode("ascii") if character in escaped else character


def _families() -> list[str]:
    import matplotlib  # pyright: ignore[reportMissingImports] (the extra `plot`)

    return list(matplotlib.rcParams["font.family"])


@lru_cache(maxsize=256)
def _lacking(characters: str, families: tuple[str, ...]) -> frozenset[str]:
    """Return the characters that none of the families holds."""
    from matplotlib.font_manager import (  # pyright: ignore[reportMissingImports] (the extra `plot`)
        FontProperties,
        findfont,
        get_font,
    )

    fonts = [get_font(findfont(FontProperties(family=[family]))) for family in families]
    return frozenset(
        c for c in characters if c.isprintable() and not any(font.get_char_index(ord(c)) for font in fonts)
    )


@lru_cache(maxsize=64)
def _others(lacking: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Return installed families that hold the characters, and the characters that have to be escaped all the same."""
    left = {c for c in lacking if _is_shaped() or not _needs_shaping(c)}
    families: list[str] = []
    while left:
        name, held = max(((name, left & _held(path, left)) for name, path in _installed()), key=lambda one: len(one[1]))
        if not held:
            break
        families.append(name)
        left -= held
    drawn = {c for c in lacking if _is_shaped() or not _needs_shaping(c)} - left
    return tuple(families), frozenset(lacking - drawn)


@lru_cache(maxsize=1)
def _installed() -> tuple[tuple[str, str], ...]:
    """Return the families of upright, plain fonts that are installed, each with a file."""
    from matplotlib.font_manager import fontManager  # pyright: ignore[reportMissingImports] (the extra `plot`)

    plain = {
        one.name: one.fname
        for one in fontManager.ttflist
        if one.style == "normal" and one.variant == "normal" and one.weight in (400, "normal", "regular")
    }
    return tuple(sorted((name, path) for name, path in plain.items() if "LastResort" not in path))


def _held(path: str, characters: set[str]) -> set[str]:
    from matplotlib.font_manager import get_font  # pyright: ignore[reportMissingImports] (the extra `plot`)

    try:
        font: Any = get_font(path)
    except (OSError, RuntimeError):  # a file that has gone, or that FreeType does not read
        return set()
    return {c for c in characters if font.get_char_index(ord(c))}


@lru_cache(maxsize=1)
def _is_shaped() -> bool:
    import matplotlib  # pyright: ignore[reportMissingImports] (the extra `plot`)

    return tuple(map(int, matplotlib.__version__.split(".")[:2])) >= _RAQM


def _needs_shaping(character: str) -> bool:
    return unicodedata.bidirectional(character) in ("R", "AL", "AN") or unicodedata.category(character) in ("Mc", "Mn")
