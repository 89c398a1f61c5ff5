"""The places of nodes on a page: columns are positions, rows are layers; nodes of one kind stand side by side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from .record import TOKEN, Place
from .seats import FEATURE, HEAD

_ROOM = 0.62  # of a column: what one of several nodes in a cell takes
_BELOW = -1.0  # the row of the tokens
_HEADS, _NEURONS, _FEATURES = -0.2, 0.2, 0.42  # in the row of a layer; attention comes first


def laid_out(places: Sequence[Place]) -> tuple[list[tuple[float, float]], list[tuple[int, float, float]]]:
    """Return (x, y) of every place, and the columns: (position, center, width).

    y counts layers, with tokens at -1. x counts columns of width 1; a column is as wide as its fullest cell needs.
    """
    cells: dict[tuple[int, float], list[int]] = defaultdict(list)
    for number, place in enumerate(places):
        cells[place.position, _row(place)].append(number)
    widths = dict.fromkeys(sorted({place.position for place in places}), 1.0)
    for (position, _), found in cells.items():
        widths[position] = max(widths[position], _ROOM * len(found))
    columns, start = [], 0.0
    for position, width in widths.items():
        columns.append((position, round(start + width / 2, 3), round(width, 3)))
        start += width
    centers = {position: center for position, center, _ in columns}
    at: list[tuple[float, float]] = [(0.0, 0.0)] * len(places)
    for (position, row), found in cells.items():
        found.sort(key=lambda number: places[number].index)
        for i, number in enumerate(found):
            x = centers[position] + (i - (len(found) - 1) / 2) * widths[position] / len(found)
            at[number] = (round(x, 3), row)
    return at, columns


def _row(place: Place) -> float:
    if place.kind == TOKEN or place.layer is None:
        return _BELOW
    shift = _HEADS if place.kind == HEAD else _FEATURES if place.kind == FEATURE else _NEURONS
    return round(place.layer + shift, 2)
