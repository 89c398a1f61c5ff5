"""Exact attribution: one decomposition, carried to the readout."""

from __future__ import annotations

from collections.abc import Sequence

from ..agreement import check_found
from ..propagation.loop import propagate
from ..readout.collect import Readout, to_results
from ..readout.targets import Directions
from ..request import Request, fit, start, traced
from ..results.attribution import Attribution


def exact(request: Request, directions: Sequence[Directions] | None = None) -> list[list[Attribution]]:
    """Return a result per read of every prompt, of components of one layer; ``directions`` stand for the targets."""
    request = traced(fit(request))
    readout, state = Readout.of(request, directions), start(request)
    check_found(request, components=[one.all.labels for one in state.layout.components], target=readout.names)
    carried, errors = propagate(
        request.adapter, request.require_trace(), state, request.end, request.run, request.read_positions
    )
    return to_results([readout.collect([request], carried, [errors])])[0]
