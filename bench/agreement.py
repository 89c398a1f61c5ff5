"""How far two rankings of the same components agree, and the spread of such figures over prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two vectors (M,); equal values share their ranks' mean. NaN for constants."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def top_overlap(a: Tensor, b: Tensor, share: float = 0.01) -> float:
    """Which part of the largest ``share`` of ``a`` (M,) by magnitude is among those of ``b``: 0 to 1. At least one."""
    count = max(1, round(share * len(a)))
    largest = [set(x.abs().topk(count).indices.tolist()) for x in (a, b)]
    return len(largest[0] & largest[1]) / count


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, p20 and p80 over the prompts."""
    low, middle, high = np.quantile(np.asarray(values, dtype=float), [0.2, 0.5, 0.8])
    return {"median": float(middle), "p20": float(low), "p80": float(high)}


def _ranks(x: Tensor) -> np.ndarray:
    values = torch.as_tensor(x).detach().cpu().double().numpy()
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]
