"""Tables of signed scores as heat maps: layers by heads, layers by positions, new tokens by earlier ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .frame import Caption, axes_of, beyond, colour_bar, points_of, side_label, write_caption
from .look import centred, checked_limit, colours_of, inches, paper
from .words import LONGEST, fitting

_CELL, _LOWEST = (0.07, 0.17), 0.7  # inches of a row, at least and at most; of the whole table
_MARKS = 5.0  # points of a cell below which the sign of negative ones is not marked
_MARKED = 0.08  # of the limit of the colours; smaller scores have no mark
_LINES = 4.0  # points of a cell below which no lines are between cells


@dataclass(frozen=True)
class Table:
    """Scores (R, C), NaN where there is none, with labels of rows and columns.

    The last ``extras`` columns, such as `rest` and `bias`, stand apart: they complete the rows' sums, and do not set
    the colours' limit. ``rows`` and ``columns`` say what the axes are.
    """

    values: Any
    row_labels: Sequence[str]
    column_labels: Sequence[str]
    rows: str
    columns: str
    extras: int = 0


def heat(
    table: Table,
    bar: str,
    caption: Caption,
    ax: Any = None,
    width: str | float | None = None,
    cmap: Any = None,
    limit: float | None = None,
) -> Any:
    """Draw a table as coloured cells with a colour bar called ``bar``; return the Axes.

    Colours are centred on zero, and full at ±``limit`` (default: the largest score of a component). ``cmap`` is a
    matplotlib colour map, by default :func:`depass_fast.plots.signed_colours`. A short line marks negative cells, so
    that a grey print tells the sign.

    Raises:
        ValueError: the limit or the width is not positive, or there is no such map.
    """
    limit = checked_limit(limit)
    values = np.asarray(table.values, dtype=np.float64)
    named = values[:, : values.shape[1] - table.extras]
    limit = limit or float(np.nanmax(np.abs(named), initial=0.0)) or 1.0
    shown, places = _with_gap(values, table.extras)
    own = ax is None
    with paper():
        wide = inches(width, "column" if shown.shape[1] <= 28 else "page")
        ax = axes_of(ax, wide, _height(shown.shape, wide))
        image = ax.imshow(
            shown,
            aspect="auto",
            interpolation="nearest",
            cmap=colours_of(cmap),
            norm=centred(limit),
        )
        colours = colour_bar(ax, image, extend=beyond(values, limit))
        for spine in ax.spines.values():
            spine.set_visible(False)
        ax.tick_params(length=0, pad=2)
        size = points_of(ax)
        colours.set_label(side_label(bar, min(size[1], 120)))
        _labels(ax, table, places, size)
        if own:
            _grow(ax)
        size = points_of(ax)
        ax.set_ylabel(side_label(table.rows, size[1]))
        _cells(ax, shown, limit, size)
        write_caption(ax, caption, own)
    return ax


def _with_gap(values: Any, extras: int) -> tuple[Any, list[int]]:
    """Return the cells with an empty column before the extras, and where each column is."""
    count = values.shape[1] - extras
    if not extras or not count:
        return values, list(range(values.shape[1]))
    gap = np.full((len(values), max(1, round(count / 40))), np.nan)
    places = [*range(count), *range(count + gap.shape[1], count + gap.shape[1] + extras)]
    return np.concatenate([values[:, :count], gap, values[:, count:]], axis=1), places


def _height(shape: tuple[int, ...], width: float) -> float:
    """Return a picture's height in inches: cells are squares where rows then are neither thin nor high."""
    cell = min(max(0.72 * width / shape[1], _CELL[0]), _CELL[1])
    return max(_LOWEST, cell * shape[0]) + 0.45


def _grow(ax: Any) -> None:
    """Make a figure higher where long labels below have left its cells less than the lowest height."""
    lacking = _LOWEST - points_of(ax)[1] / 72
    if lacking > 0:
        root = ax.figure.figure
        root.set_figheight(root.get_figheight() + lacking)


def _labels(ax: Any, table: Table, places: Sequence[int], size: tuple[float, float]) -> None:
    wide, high = size
    ax.set_xlabel(table.columns)
    every = _every(len(table.row_labels), high)
    texts, families = fitting(table.row_labels[::every], LONGEST)
    ax.set_yticks(range(0, len(table.row_labels), every), texts, fontfamily=families)
    count = len(places) - table.extras
    every, names = _every(len(places) + 1, wide), [*table.column_labels]
    if every > 1:  # then columns are counted
        names[:count] = map(str, range(count))
        every = _every(len(places) + 1, wide * 8 / (4.4 * len(f"{count} ")))
    shown = list(range(0, count, every))
    while shown and table.extras and (count - shown[-1]) * wide / (places[-1] + 1) < 8:
        shown.pop()
    chosen = [*shown, *range(count, len(places))]
    texts, families = fitting([names[k] for k in chosen], LONGEST)
    longest = max(map(len, texts[: len(shown)]), default=0)
    upright = (longest + 1) * 4.4 > wide * every / (places[-1] + 1)
    ax.set_xticks([places[k] for k in chosen], texts, rotation=90 if upright else 0, fontfamily=families)


def _every(count: int, points: float) -> int:
    """Return the step at which labels have room: 1, 2, 5, 10, ..."""
    for power in range(6):
        for step in (1, 2, 5):
            if count / (step * 10**power) * 8 <= points:
                return step * 10**power
    return count


def _cells(ax: Any, shown: Any, limit: float, size: tuple[float, float]) -> None:
    """Draw thin lines between cells and mark negative ones, where cells are large enough."""
    wide, high = (points / count for points, count in zip(size, shown.shape[::-1], strict=True))
    if min(wide, high) >= _LINES:
        back = ax.get_facecolor()
        ax.set_xticks(np.arange(shown.shape[1] - 1) + 0.5, minor=True)
        ax.set_yticks(np.arange(shown.shape[0] - 1) + 0.5, minor=True)
        ax.grid(which="minor", color=back, linewidth=0.6, alpha=1.0)
        ax.tick_params(which="minor", length=0)
    if min(wide, high) < _MARKS:
        return
    negative = np.nan_to_num(shown) < -_MARKED * limit
    dark = np.nan_to_num(shown) < -0.55 * limit
    for which, colour in ((negative & ~dark, "#1d3c5c"), (dark, "#ffffff")):
        y, x = np.nonzero(which)
        ax.plot(x, y, linestyle="", marker="_", color=colour, markersize=min(4.0, 0.5 * min(wide, high)), mew=0.8)
    ax.set_xlim(-0.5, shown.shape[1] - 0.5)
    ax.set_ylim(shown.shape[0] - 0.5, -0.5)
