"""States rather than scores: decompose, start, and carry on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..adapters import Adapter
from ..inputs.hook_names import layer_input
from ..propagation.loop import propagate, through_final_norm
from ..propagation.run import Run
from ..request import Request, fit, start, traced
from ..results.verification import warned
from ..state.state import ComponentState
from ..trace.record import Trace


def decompose(request: Request) -> ComponentState:
    """Return the state at the end of its way, with its completeness error."""
    request = traced(fit(request))
    trace, final_norm = request.require_trace(), request.end_given is None
    state, errors = propagate(request.adapter, trace, start(request), request.end, request.run)
    return _finished(request.adapter, trace, state, errors, request.run, final_norm)


def start_of(request: Request) -> ComponentState:
    """Return the components where they start, as :func:`carry` takes them. Its rows may be changed."""
    entering = request.components.entry(request.adapter).layer
    request = traced(replace(request, run=fit(replace(request, end_given=entering)).run))  # it is carried no further
    state = start(request)
    state.factors = None  # they would no longer hold
    return state


def carry(adapter: Adapter, trace: Trace, state: ComponentState, end: int | str | None, run: Run) -> ComponentState:
    """Carry a state, complete or not, to the input of layer ``end``; None: after the final norm. It is used up.

    Raises:
        ValueError: ``end`` does not lie before it, the trace is another model's or of other prompts.
    """
    trace.source.check(adapter.model)
    if not np.array_equal(state.layout.packed, np.arange(trace.offsets[-1])):
        raise ValueError("state: it does not hold all positions of the trace's prompts.")
    n_layers = adapter.n_layers
    first, last = state.layer + (state.site == "resid_mid"), n_layers if end is None else layer_input(end, "end")
    if not first <= last <= n_layers:
        raise ValueError(f"end: {end!r} is out of range; this state reaches layers {first} to {n_layers}.")
    before = state.completeness_error or 0.0
    carried, errors = propagate(adapter, trace, state, last, run)
    finished = _finished(adapter, trace, carried, errors, run, end is None)
    return replace(finished, completeness_error=max(before, finished.completeness_error or 0.0))


def _finished(
    adapter: Adapter, trace: Trace, state: ComponentState, errors: Sequence[Tensor], run: Run, final_norm: bool
) -> ComponentState:
    """Return a state at the end of its way, with what was measured on it."""
    found = run.verified()
    warned(found, run.backend.name)
    state = through_final_norm(adapter, trace, state) if final_norm else state
    return replace(state, verification=found, completeness_error=float(torch.stack(list(errors)).max()))
