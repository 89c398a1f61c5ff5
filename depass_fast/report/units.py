"""Scores as whole numbers of a small unit, so that the rows of a page add up without rounding.

A sum is rounded once, its rows are rounded to add up to it, and what is left out is the difference: `others`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DIGITS = 7  # of the largest number of a sheet
SHARE = 0.98  # of Σ |score|: what is kept of a table


def unit_of(largest: float) -> float:
    """Return the unit, a power of ten, in which numbers up to ``largest`` have seven digits.

    Raises:
        ValueError: ``largest`` is infinite or no number.
    """
    if not math.isfinite(largest):
        raise ValueError("to_html: the scores hold NaN or infinity, of which there is no picture.")
    return 10.0 ** (math.floor(math.log10(largest)) + 1 - DIGITS) if largest else 1.0


def in_units(values: np.ndarray | Sequence[float], unit: float) -> np.ndarray:
    """Return values as whole numbers of a unit, each rounded by itself."""
    return np.rint(np.asarray(values, np.float64) / unit).astype(np.int64)


def apportioned(values: np.ndarray, unit: float, total: int) -> np.ndarray:
    """Return values (M,) as whole numbers that add up to ``total``; none is off by more than its rounding and one.

    Those that rounding has changed most are changed back. ``total`` must be what the values sum to, rounded.
    """
    exact = np.asarray(values, np.float64) / unit
    found = np.rint(exact).astype(np.int64)
    missing = total - int(found.sum())
    if missing:
        step = 1 if missing > 0 else -1
        order = np.argsort(step * (found - exact), kind="stable")
        found[order[: abs(missing)]] += step
    return found


def leading(sizes: np.ndarray, most: int, share: float = SHARE) -> np.ndarray:
    """Return the places of the largest ``sizes`` (M,) that hold a ``share`` of their sum, in order; ``most`` at most.

    All are kept where they are no more than 24.
    """
    if len(sizes) <= min(24, most):
        return np.arange(len(sizes))
    order = np.argsort(-sizes, kind="stable")
    held = np.cumsum(sizes[order])
    count = int(np.searchsorted(held, share * held[-1])) + 1 if held[-1] > 0 else 1
    return np.sort(order[: min(count, most)])


@dataclass(frozen=True)
class Group:
    """Rows that add up, with what was left out, to ``total``, all in units.

    ``rows`` are the kept components as (label, number); ``others`` is how many were left out and their sum. ``rest``
    and ``bias`` are None where there is no such component. ``layer`` is None for what is of no layer.
    """

    rows: list[tuple[str, int]]
    others: tuple[int, int]
    rest: int | None
    bias: int | None
    total: int
    layer: int | None = None

    @property
    def added(self) -> int:
        """The sum of the rows, the others, `rest` and `bias`: ``total``, or the group is wrong."""
        return sum(number for _, number in self.rows) + self.others[1] + (self.rest or 0) + (self.bias or 0)

    def plain(self) -> dict[str, object]:
        """Return the group as JSON holds it."""
        return {
            "layer": self.layer,
            "rows": [list(row) for row in self.rows],
            "others": list(self.others),
            "rest": self.rest,
            "bias": self.bias,
            "total": self.total,
        }


def group_of(
    labels: Sequence[str],
    scores: np.ndarray,
    unit: float,
    kept: np.ndarray,
    rest: float | None = None,
    bias: float | None = None,
    layer: int | None = None,
) -> Group:
    """Return named components (M,) as a group that holds those at the places ``kept``, and the sum of the others."""
    named = np.asarray(scores, np.float64)
    extras = [None if one is None else float(one) for one in (rest, bias)]
    total = round((math.fsum(named) + math.fsum(one or 0.0 for one in extras)) / unit)
    left_out = len(named) - len(kept)
    gone = math.fsum(named) - math.fsum(named[kept])
    parts = [*named[kept], *([gone] if left_out else []), *(one for one in extras if one is not None)]
    numbers = apportioned(np.array(parts), unit, total).tolist()
    rows = list(zip((labels[int(i)] for i in kept), numbers, strict=False))
    behind = iter(numbers[len(kept) :])
    others = (left_out, next(behind) if left_out else 0)
    of_rest, of_bias = (None if one is None else next(behind) for one in extras)
    return Group(rows, others, of_rest, of_bias, total, layer)
