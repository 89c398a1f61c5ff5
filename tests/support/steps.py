"""The steps of a run one by one: the bound request, the initial state with its factors, the layer loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from depass_fast import ComponentKind, ComponentState, DePass, Trace
from depass_fast.propagation.loop import propagate
from depass_fast.request import Request, fit, make_request, start, traced


def request_of(dp: DePass, trace: Trace, kind: ComponentKind, **options: Any) -> Request:
    """A request with its components bound."""
    return traced(fit(make_request(dp.adapter, dp.tokenizer, dp.options.updated(options), trace, kind)))


def start_state(dp: DePass, trace: Trace, kind: ComponentKind, **options: Any) -> ComponentState:
    """The initial state of the components, its factors included."""
    return start(request_of(dp, trace, kind, **options))


def carried(
    dp: DePass,
    trace: Trace,
    state: ComponentState,
    end: int,
    run: Any,
    reads: Sequence[Sequence[int]] | None = None,
) -> tuple[ComponentState, list[Tensor]]:
    """A state carried to the input of layer ``end``, without a readout, and its errors: the layer loop."""
    return propagate(dp.adapter, trace, state, end, run, reads)
