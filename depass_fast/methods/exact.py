"""Exact attribution: one decomposition, carried to the readout."""

from __future__ import annotations

from ..propagation.loop import propagate
from ..readout.collect import Readout, to_results
from ..request import Request, fit, start, traced
from ..results.attribution import Attribution


def exact(request: Request) -> list[Attribution]:
    """Return a result per prompt, of components of one layer."""
    request = traced(fit(request))
    readout = Readout.of(request, list(enumerate(request.reads)), request.targets)
    reads = [[read] for read in request.reads]
    state = start(request)
    carried, errors = propagate(request.adapter, request.require_trace(), state, request.end, request.run, reads)
    return to_results([readout.collect([request], carried, [errors])])[0]
