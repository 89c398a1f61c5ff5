"""The agreement of two rankings of the same components, and the spread of figures over prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from depass_fast.evaluate import statistics


def top_overlap(a: Tensor, b: Tensor, share: float = 0.01) -> float:
    """The part (0 to 1) of the largest ``share`` of ``a`` (M,) by magnitude that is among the largest of ``b``.

    At least one component counts as largest.
    """
    return statistics.top_overlap(a, b, max(1, round(share * len(a))))


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, p20 and p80 over the prompts."""
    low, middle, high = np.quantile(np.asarray(values, dtype=float), [0.2, 0.5, 0.8])
    return {"median": float(middle), "p20": float(low), "p80": float(high)}
