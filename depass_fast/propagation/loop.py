"""The layer loop: a component state carried through the layers, one backend step after the other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..adapters import Adapter, looked_up_once
from ..runtime.precision import full_precision
from ..runtime.progress import progress_bar
from ..state.completeness import Completeness
from ..state.state import ComponentState
from ..trace.record import Trace
from .earlier import EarlierStates
from .layer import normalise, through_layer
from .run import Run
from .streams import collapsed


@torch.no_grad()
@looked_up_once()
@full_precision()
def propagate(
    adapter: Adapter,
    trace: Trace,
    state: ComponentState,
    end: int,
    run: Run,
    reads: Sequence[Sequence[int]] | None = None,
) -> tuple[ComponentState, list[Tensor]]:
    """Carry ``state`` to the input of layer ``end``. It is used up: it holds no rows afterwards.

    With ``reads``, local positions of every prompt, the last layer computes these positions only.

    Returns:
        the state; its completeness errors, (P,) each, at the start and after every layer, where the state is.
    """
    run.watch(trace, reads)
    first, queries = state.layer, None
    run.backend.begin(adapter, trace, first, end)
    if reads is not None:
        queries = state.layout.at(trace.offsets, [np.array(r) for r in reads])
    found, earlier = Completeness(run.missed), EarlierStates(adapter, state.earlier)
    found.measure(state, trace.resid_at(first, state.site))
    with progress_bar("layers", end - first, run.progress) as bar:
        for index in range(first, end):
            layer = adapter.layer(index)
            state.rows = state.rows if run.host else state.rows.to(layer.device)
            kept = queries if index == end - 1 else None
            state = through_layer(state.moved(), layer, trace.layers[index], run, kept, earlier)
            found.measure(state, trace.resid(index + 1))
            if bar is not None:
                bar.finish()
    if queries is not None and first == end:
        state = state.at(queries)
    state.factors, state.earlier = None, earlier.needed(end) or None
    return state, found.errors()


@torch.no_grad()
def through_final_norm(adapter: Adapter, trace: Trace, state: ComponentState) -> ComponentState:
    """Return the state after the frozen final norm; in place, unless there are several streams."""
    end = adapter.stream_end(trace.end_read)
    if end is not None:
        state = collapsed(state, end)
    normalise(state, adapter.final_norm(), trace.before_norm)
    return ComponentState(state.rows, state.layout, state.layer)
