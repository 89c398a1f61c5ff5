"""A layer whose branches carry what they write to later positions: a branch adds to rows of zeros, which are spread."""

from __future__ import annotations

import numpy as np

from ..adapters import Layer
from ..adapters.spread import Spread
from ..runtime.transfer import to_device
from ..state.state import ComponentState
from ..trace.record import LayerTrace
from .mlps import share_out
from .run import Run
from .streams import AT_ONCE, zeros_like


def through_attention(state: ComponentState, layer: Layer, record: LayerTrace, run: Run) -> None:
    """Add to a state, in place, what the attention of ``layer`` gives."""
    zeros = zeros_like(state, state, state.rows.shape[1])
    given = run.operations.aggregate_ov(zeros, layer.attention, run.frozen(record.attention), None, state)
    _add(state, given, layer.attention.spread)


def through_mlps(state: ComponentState, layer: Layer, record: LayerTrace, run: Run) -> None:
    """Add to a state, in place, what the MLP or the experts of ``layer`` give."""
    given = zeros_like(state, state, state.rows.shape[1])
    for part in record.mlps:
        given = share_out(given, state, layer.mlps[part.part], part, run)
    _add(state, given, layer.mlp.spread)


def _add(state: ComponentState, given: ComponentState, spread: Spread | None) -> None:
    """Add the rows of ``given`` to those of a state at the same position and at later ones, some at a time."""
    rows, layout = state.rows, state.layout
    state.factors = None
    if spread is None:
        rows.add_(given.rows)
        return
    taps = spread.taps.to(rows)
    segments = layout.row_segments()
    within = np.arange(layout.n_rows) - layout.starts[segments]  # a component's place at its position
    size = max(1, AT_ONCE[rows.device.type == "cpu"] // rows.shape[1])
    for back in range(len(taps)):
        read = np.maximum(segments - back, 0)
        there = (segments >= back) & (layout.prompt[read] == layout.prompt[segments])
        there &= within < layout.counts[read]  # a component that is born later has nothing there
        target = np.flatnonzero(there)
        source = layout.starts[read[target]] + within[target]
        for at, of in zip(*(to_device(x, rows.device).split(size) for x in (target, source)), strict=True):
            rows.index_add_(0, at, given.rows[of].mul_(taps[back]))
