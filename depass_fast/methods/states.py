"""States rather than scores: decompose, start, and carry on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..adapters import Adapter
from ..components.base import Entry
from ..inputs.hook_names import layer_input
from ..propagation.loop import propagate, through_final_norm
from ..propagation.run import Run
from ..readout.completeness import warn_if_states_miss
from ..request import Request, fit, start, traced
from ..results.verification import warn_if_off
from ..state.state import ComponentState
from ..trace.activations import check_activations
from ..trace.record import Trace


def decompose(request: Request) -> ComponentState:
    """Return the state at the end of its way, with its completeness error."""
    request = traced(fit(request))
    trace, final_norm = request.require_trace(), request.end_given is None
    state, errors = propagate(request.adapter, trace, start(request), request.end, request.run)
    warn_if_states_miss(request.adapter, request.run, errors)
    return _finished(request.adapter, trace, state, errors, request.run, final_norm)


def start_of(request: Request) -> ComponentState:
    """Return the components where they start, as :func:`carry` takes them. Its rows may be changed."""
    entering = request.components.entry(request.adapter).layer
    request = traced(fit(replace(request, end_given=entering, end=entering)))  # it is carried no further
    state = start(request)
    state.factors = None  # they would no longer hold
    return state


def check_trace(trace: Trace) -> None:
    """Raise TypeError unless ``trace`` is one."""
    if not isinstance(trace, Trace):
        raise TypeError(f"trace: expected dp.trace(prompt), got {type(trace).__name__}.")


def carry(adapter: Adapter, trace: Trace, state: ComponentState, end: int | str | None, run: Run) -> ComponentState:
    """Carry a state, complete or not, to the input of layer ``end``; None: after the final norm. It is used up.

    Raises:
        ValueError: ``end`` does not lie before it, the trace is another model's or of other prompts.
        TypeError: ``trace`` or ``state`` is something else.
    """
    check_trace(trace)
    if not isinstance(state, ComponentState):
        raise TypeError(f"state: expected dp.start(...) or dp.decompose(...), got {type(state).__name__}.")
    trace.source.check(adapter.model)
    if run.allocation.needs_activations:
        check_activations(adapter, trace)
    if not np.array_equal(state.layout.packed, np.arange(trace.offsets[-1])):
        raise ValueError("state: it does not hold all positions of the trace's prompts.")
    last = adapter.n_layers if end is None else layer_input(end, "end")
    entry = Entry(state.layer, "resid_mid" if state.site == "resid_mid" else "resid_pre")
    entry.check_end(last, adapter.n_layers, "these components", end)
    before = state.completeness_error or 0.0
    carried, errors = propagate(adapter, trace, state, last, run)
    warn_if_states_miss(adapter, run, errors)
    finished = _finished(adapter, trace, carried, errors, run, end is None)
    return replace(finished, completeness_error=max(before, finished.completeness_error or 0.0))


def _finished(
    adapter: Adapter, trace: Trace, state: ComponentState, errors: Sequence[Tensor], run: Run, final_norm: bool
) -> ComponentState:
    """Return a state at the end of its way, with what was measured on it."""
    found = run.verified()
    warn_if_off(found, run.backend.name)
    state = through_final_norm(adapter, trace, state) if final_norm else state
    return replace(state, verification=found, completeness_error=float(torch.stack(list(errors)).max()))
