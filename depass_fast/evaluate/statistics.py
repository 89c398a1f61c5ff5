"""Means with their 95 % intervals, differences of methods on the same prompts, and agreement of scores.

Intervals are percentiles of the bootstrap over prompts: prompts are drawn with replacement, all methods on the same
draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
from torch import Tensor

from .catalog import FEWEST

DRAWS = 2000

Quantity: TypeAlias = Callable[[np.ndarray], np.ndarray]


def mean(values: Sequence[float], seed: int = 0) -> dict[str, float | int | None]:
    """Return the mean of ``values``, one per prompt, its 95 % interval ``low`` to ``high``, and their number ``n``.

    The interval is None for fewer than :data:`FEWEST` values. NaN is no value.
    """
    found = np.asarray(values, dtype=float)
    found = found[~np.isnan(found)]
    low, high = _interval(found, seed)
    return {"mean": float(found.mean()) if len(found) else None, "low": low, "high": high, "n": len(found)}


def difference(a: Sequence[float], b: Sequence[float], seed: int = 0) -> dict[str, float | int | bool | None]:
    """Return the mean of a - b over the same prompts as :func:`mean` does, and whether it is ``significant``.

    It is where the interval leaves zero out. None where there is no interval.
    """
    return _judged(mean((np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).tolist(), seed))


def of_means(values: np.ndarray, quantity: Quantity, seed: int = 0) -> dict[str, float | int | None]:
    """Return a ``quantity`` of the means over prompts, values (n, K), with its interval as :func:`mean` does.

    ``quantity`` takes means (..., K) to numbers (...). None for what is not finite.
    """
    found = float(quantity(values.mean(0)))
    low, high = _interval(values, seed, quantity)
    return {"mean": found if np.isfinite(found) else None, "low": low, "high": high, "n": len(values)}


def difference_of_means(
    a: np.ndarray, b: np.ndarray, quantity: Quantity, seed: int = 0
) -> dict[str, float | int | bool | None]:
    """Return ``quantity`` of the means of a (n, K) less that of b, of the same prompts, as :func:`difference` does."""
    width = a.shape[1]

    def apart(means: np.ndarray) -> np.ndarray:
        return quantity(means[..., :width]) - quantity(means[..., width:])

    return _judged(of_means(np.concatenate([a, b], 1), apart, seed))


def _judged(found: Mapping[str, float | int | None]) -> dict[str, float | int | bool | None]:
    low, high = found["low"], found["high"]
    return {**found, "significant": None if low is None or high is None else low > 0 or high < 0}


def _interval(
    values: np.ndarray, seed: int, quantity: Quantity = lambda means: means
) -> tuple[float | None, float | None]:
    if len(values) < FEWEST:
        return None, None
    draws = np.random.default_rng(seed).integers(len(values), size=(DRAWS, len(values)))
    found = quantity(values[draws].mean(1))
    if not np.isfinite(found).all():
        return None, None
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)


def pearson(a: Tensor, b: Tensor) -> float:
    """Return the correlation of two score vectors (M,); NaN where one is constant."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size else float("nan")


def top_overlap(a: Tensor, b: Tensor, count: int) -> float:
    """Return the part (0 to 1) of the ``count`` largest of a (M,) by size that is among those of b."""
    largest = [set(x.abs().topk(count).indices.tolist()) for x in (a, b)]
    return len(largest[0] & largest[1]) / count


def relative_error(scores: Tensor, exact: Tensor) -> float:
    """Return ‖scores - exact‖ / ‖exact‖ of two score vectors (M,)."""
    return float((scores - exact).norm() / exact.norm())


def rounded(value: float, digits: int = 5) -> float | None:
    """Return a number with ``digits`` significant digits, None for what is not finite, as rows hold it."""
    return None if not math.isfinite(value) else float(f"{value:.{digits}g}")
