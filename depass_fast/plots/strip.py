"""A prompt as text, every token on the colour of its score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..labels import shown_tokens
from ..runtime.terminal import text_width
from .frame import Caption, axes_of, beyond, colour_bar, points_of, write_caption
from .look import centred, colours_of, inches, paper
from .words import fitting

_FAMILY = "DejaVu Sans Mono"  # comes with matplotlib; every character is as wide as the next
_ADVANCE, _ROW = 0.602, 1.75  # sizes of the font: a character's width, a line's height
_SIZE, _SMALLEST = 7.5, 2.5  # points
_PAD = 1.2  # points left and right of a token
_LONGEST = 40  # characters of a token


def strip(
    tokens: Sequence[str],
    scores: Sequence[float],
    bar: str,
    caption: Caption,
    ax: Any = None,
    width: str | float | None = None,
    cmap: Any = None,
    limit: float | None = None,
) -> Any:
    """Draw tokens as running text in coloured boxes, with a colour bar called ``bar``; return the Axes.

    Colours are full at ±``limit`` (default: the largest score). A line under a token marks a negative score. In Axes of
    the user's the text is made smaller until it fits.
    """
    with paper():
        texts, families = fitting([token.replace("\n", "⏎") for token in shown_tokens(tokens)], _LONGEST)
        families = [_FAMILY, *families]
        wide, own = inches(width, "column" if len(tokens) <= 30 else "page"), ax is None
        rows = len(_broken(texts, 72 * 0.84 * wide, _SIZE))
        ax = axes_of(ax, wide, rows * _SIZE * _ROW / 72 + 0.1)
        largest = max(map(abs, scores), default=0.0)
        limit = limit or largest or 1.0
        ax.axis("off")
        from matplotlib.cm import ScalarMappable  # pyright: ignore[reportMissingImports] (the extra `plot`)

        mapped = ScalarMappable(centred(limit), colours_of(cmap))
        made = colour_bar(ax, mapped, extend=beyond(scores, limit))
        made.set_label(bar)
        made.set_ticks([-limit, 0, limit], labels=[f"−{limit:.3g}", "0", f"{limit:.3g}"])
        write_caption(ax, caption, own)
        room, high = points_of(ax)
        size, lines = _fitted(texts, room, None if own else high)
        ax.set_xlim(0, room)
        ax.set_ylim(max(high, len(lines) * size * _ROW), 0)
        _draw(ax, lines, texts, list(mapped.to_rgba(np.asarray(scores, dtype=np.float64))), scores, size, families)
    return ax


def _fitted(texts: Sequence[str], room: float, high: float | None) -> tuple[float, list[list[int]]]:
    """Return the largest size whose lines fit into ``room`` × ``high`` points, and the lines."""
    size = _SIZE
    lines = _broken(texts, room, size)
    while high is not None and size > _SMALLEST and len(lines) * size * _ROW > high:
        size -= 0.25
        lines = _broken(texts, room, size)
    return size, lines


def _broken(texts: Sequence[str], room: float, size: float) -> list[list[int]]:
    """Return the tokens of every line, by their numbers. A line break of the text ends a line."""
    lines: list[list[int]] = [[]]
    used = 0.0
    for number, text in enumerate(texts):
        wide = _wide(text, size)
        if lines[-1] and used + wide > room:
            lines.append([])
            used = 0.0
        lines[-1].append(number)
        used += wide
        if text.endswith("⏎") and number + 1 < len(texts):
            lines.append([])
            used = 0.0
    return lines


def _wide(text: str, size: float) -> float:
    return max(1, text_width(text)) * _ADVANCE * size + 2 * _PAD


def _draw(
    ax: Any,
    lines: Sequence[Sequence[int]],
    texts: Sequence[str],
    colours: Sequence[Any],
    scores: Sequence[float],
    size: float,
    families: list[str],
) -> None:
    from matplotlib.collections import PatchCollection  # pyright: ignore[reportMissingImports] (the extra `plot`)
    from matplotlib.patches import Rectangle  # pyright: ignore[reportMissingImports] (the extra `plot`)

    boxes, faces, under, height = [], [], [], size * _ROW
    largest = max(map(abs, scores), default=0.0)
    for row, line in enumerate(lines):
        x, y = 0.0, row * height
        for number in line:
            wide, colour = _wide(texts[number], size), colours[number]
            boxes.append(Rectangle((x, y + 0.06 * height), wide, 0.86 * height))
            faces.append(colour)
            dark = 0.2126 * colour[0] + 0.7152 * colour[1] + 0.0722 * colour[2] < 0.5
            text_colour = "#ffffff" if dark else "#111111"
            ax.text(
                x + _PAD,
                y + 0.5 * height,
                texts[number].strip(" ") if texts[number].isspace() else texts[number],
                fontsize=size,
                fontfamily=families,
                va="center_baseline",
                color=text_colour,
                clip_on=True,
            )
            if scores[number] < -0.03 * largest:
                under.append(((x + _PAD, x + wide - _PAD), y + 0.84 * height, text_colour))
            x += wide
    ax.add_collection(PatchCollection(boxes, facecolors=faces, edgecolors="#ffffff", linewidths=0.5, zorder=0))
    for (left, right), y, colour in under:
        ax.plot((left, right), (y, y), color=colour, linewidth=0.7, solid_capstyle="butt")
