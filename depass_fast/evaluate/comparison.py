"""Methods compared on the same prompts: their means, and what is told from the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from .statistics import Quantity, difference, difference_of_means, mean, of_means, rounded
from .tables import figure

Compared: TypeAlias = dict[str, Any]


def compared(values: Mapping[str, Sequence[float | None]], higher: bool, seed: int = 0) -> dict[str, Compared]:
    """Return the mean of every method, as :func:`depass_fast.evaluate.statistics.mean`, and its distance from the best.

    ``values`` are a value per prompt, of the same prompts in one order; None, and NaN, is no value. The best has the
    highest mean where ``higher``, else the lowest. "from_best" is the paired difference from it, None for the best.
    """
    given = {name: [math.nan if x is None else float(x) for x in each] for name, each in values.items()}
    means = {name: mean(each, seed) for name, each in given.items()}
    return _from_best(means, higher, lambda name, best: difference(given[name], given[best], seed))


def compared_of_means(
    values: Mapping[str, np.ndarray], quantity: Quantity, higher: bool, seed: int = 0
) -> dict[str, Compared]:
    """Return what :func:`compared` does, of a ``quantity`` of the means over prompts; values (n, K) for every method.

    ``quantity`` is as in :func:`depass_fast.evaluate.statistics.of_means`.
    """
    means = {name: of_means(each, quantity, seed) for name, each in values.items()}
    return _from_best(means, higher, lambda name, best: difference_of_means(values[name], values[best], quantity, seed))


def _from_best(
    means: Mapping[str, Mapping[str, Any]], higher: bool, difference_from: Callable[[str, str], Mapping[str, Any]]
) -> dict[str, Compared]:
    sign, most = 1.0 if higher else -1.0, max((one["n"] for one in means.values()), default=0)
    rivals = {name: one for name, one in means.items() if one["n"] == most}  # few prompts are no base for the best
    ranked = [(sign * middle, name) for name, one in rivals.items() if (middle := one["mean"]) is not None]
    best = max(ranked, key=lambda pair: pair[0])[1] if ranked else None
    found: dict[str, Compared] = {}
    for name, one in means.items():
        apart = None if name == best or best is None else _plain(difference_from(name, best))
        found[name] = {**_plain(one), "from_best": apart}
    return found


def leading(found: Compared) -> bool:
    """True for the best of :func:`compared`, and for a method that is not told from it; False without intervals."""
    return found["low"] is not None and (found["from_best"] is None or found["from_best"]["significant"] is False)


def cell(found: Compared, digits: int = 3) -> str:
    """Return a mean with its interval as text, and an asterisk where it is :func:`leading`."""
    return figure(found, digits) + ("*" if leading(found) else "")


def _plain(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: rounded(x, 5) if isinstance(x, float) else x for name, x in found.items()}
