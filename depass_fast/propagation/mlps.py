"""One MLP or expert of a layer as a step of the backend, at the positions that were sent to it."""

from __future__ import annotations

import numpy as np

from ..adapters import Mlp
from ..runtime.transfer import to_device
from ..state.state import ComponentState
from ..trace.record import MlpTrace
from .run import Run

_PART = 1 << 22  # numbers of a state that are given back at a time


def share_out(
    state: ComponentState, source: ComponentState | None, mlp: Mlp, part: MlpTrace, run: Run
) -> ComponentState:
    """Return the state after one MLP or expert, which reads ``source``; None: the state itself."""
    if mlp.is_linear:
        _give_back(state, state if source is None else source, mlp, part)
        return state
    if part.host_positions is None:
        return run.operations.allocate_mlp(state, mlp, part, run.allocation, source)
    segments = np.flatnonzero(np.isin(state.layout.packed, part.host_positions))
    if len(segments):
        read = None if source is None else source.take(segments)
        state.put(run.operations.allocate_mlp(state.take(segments), mlp, part, run.allocation, read), segments)
    return state


def _give_back(state: ComponentState, source: ComponentState, mlp: Mlp, part: MlpTrace) -> None:
    """Add the components of ``source`` behind the norm, times the router's weight, in place: nothing meets there."""
    assert part.router_weight is not None
    numbers = (mlp.scale(part.resid) * part.router_weight * mlp.factor).to(state.rows)  # (T,)
    packed = to_device(state.layout.packed[state.layout.row_segments()], state.device)
    state.factors, size = None, max(1, _PART // state.rows.shape[1])
    for rows, read, at in zip(*(x.split(size) for x in (state.rows, source.rows, packed)), strict=True):
        given = read * numbers[at, None]
        rows.add_(given if mlp.norm is None or mlp.norm.weight is None else given.mul_(mlp.norm.weight.to(given)))
