"""The completeness of a state by a kernel, in one reading: launches of short work are what a GPU waits for."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...kernels.common import FLOATS
from ...kernels.completeness import Jagged, Regular, missed_norms
from ...state.layout import Layout
from ...state.state import ComponentState

_MANY_ROWS = 1024  # of a position, from which torch's sum has as few launches for its work


def missed(state: ComponentState, resid: Tensor) -> tuple[Tensor, Tensor] | None:
    """Measure a state as :meth:`ComponentState.missed`, by blocks of columns; None where the kernel is not for it."""
    layout, x = state.layout, resid.to(state.device)
    known = state.rows.dtype == torch.float32 and state.rows.is_contiguous() and x.dtype in FLOATS
    if not known or not len(x) or not len(layout.counts) or layout.counts.max() > _MANY_ROWS:
        return None
    segments = _regular(layout, len(x))
    if segments is None:
        segments = Jagged(*(layout.tensor(name, state.device) for name in ("starts", "packed")))
    return missed_norms(state.rows, x.contiguous(), segments)


def _regular(layout: Layout, positions: int) -> Regular | None:
    """Return the segments, if all have equally many rows, and all ``positions`` equally many of them."""
    counts, (together, left) = layout.counts, divmod(len(layout.counts), positions)
    if left or (counts != counts[0]).any():
        return None
    if not np.array_equal(layout.packed, np.repeat(np.arange(positions), together)):
        return None
    return Regular(int(counts[0]), together)
