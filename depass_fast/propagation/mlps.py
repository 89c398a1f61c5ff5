"""One MLP or expert of a layer as a step of the backend, at the positions that were sent to it."""

from __future__ import annotations

import numpy as np

from ..adapters import Mlp
from ..state.state import ComponentState
from ..trace.record import MlpTrace
from .run import Run


def share_out(
    state: ComponentState, source: ComponentState | None, mlp: Mlp, part: MlpTrace, run: Run
) -> ComponentState:
    """Return the state after one MLP or expert, which reads ``source``; None: the state itself."""
    if part.host_positions is None:
        return run.operations.allocate_mlp(state, mlp, part, run.allocation, source)
    segments = np.flatnonzero(np.isin(state.layout.packed, part.host_positions))
    if len(segments):
        read = None if source is None else source.take(segments)
        state.put(run.operations.allocate_mlp(state.take(segments), mlp, part, run.allocation, read), segments)
    return state
