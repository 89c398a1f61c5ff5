"""Circuits of MIB at the level of nodes: the top components kept, all others off. CPR and CMD.

With C_k the top share k of the nodes and m the lead, the target's logit minus the foil's, in the mean over prompts:

    f(k) = (m(C_k) - m(nothing)) / (m(model) - m(nothing)),   CPR = ∫ f dk,   CMD = ∫ |1 - f| dk,

by trapezoids over :data:`KEPT`, as in hannamw/MIB-circuit-track. CPR goes with the signed ranking, CMD with that by
size. MIB takes what is off from a counterfactual prompt; here it is zero, as the prompts have no counterfactual.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

KEPT = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # of all nodes
CPR, CMD = "CPR", "CMD"


def kept_masks(order: Tensor) -> Iterator[Tensor]:
    """Yield the mask (M,) bool of all but the top, for every share of :data:`KEPT`; order (M,), the lowest first.

    Counts are rounded down: a small share of few nodes keeps none.
    """
    for share in KEPT:
        mask = torch.ones(len(order), dtype=torch.bool)
        mask[order[len(order) - int(share * len(order)) :]] = False
        yield mask


def faithfulness(leads: np.ndarray) -> np.ndarray:
    """Return f (..., K) of leads (..., 2 + K): of the whole model, of nothing, and of the kept shares.

    NaN where nothing leads as the whole model does.
    """
    model, nothing, kept = leads[..., :1], leads[..., 1:2], leads[..., 2:]
    whole = model - nothing
    return (kept - nothing) / np.where(whole == 0, np.nan, whole)


def cpr(leads: np.ndarray) -> np.ndarray:
    """Return the area (...) under f of leads (..., 2 + K). Higher is better: it finds what raises the lead."""
    return _area(faithfulness(leads))


def cmd(leads: np.ndarray) -> np.ndarray:
    """Return the area (...) between f and 1 of leads (..., 2 + K). Lower is better: it does what the model does."""
    return _area(np.abs(1 - faithfulness(leads)))


def _area(f: np.ndarray) -> np.ndarray:
    return ((f[..., 1:] + f[..., :-1]) / 2 * np.diff(KEPT)).sum(-1)
