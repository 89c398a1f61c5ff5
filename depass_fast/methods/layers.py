"""Exact attribution for components of several layers: a decomposition per layer, in one sweep where possible."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from torch import Tensor

from ..agreement import check_found
from ..components.base import ComponentKind
from ..components.start import each_meets_bias
from ..labels import BIAS
from ..planning.shapes import named_components
from ..propagation.joint import PendingState, can_propagate_jointly, carry_jointly, group_by_memory
from ..propagation.loop import propagate
from ..readout.collect import Readout, to_results
from ..readout.targets import Directions
from ..request import Request, at_layer, fit, start, with_trace
from ..results.attribution import Attribution
from ..results.layered import LayeredAttribution, warnings_of_layers
from ..state.state import ComponentState
from .survey import Survey, largest, survey


def layers(request: Request, directions: Sequence[Directions] | None = None) -> list[list[LayeredAttribution]]:
    """Return a result per read of every prompt, of all layers; ``directions`` stand for the targets."""
    adapter, kinds = request.adapter, request.components.each(request.adapter)
    request, surveys = _ready(request, kinds)
    ahead = each_meets_bias(kinds, adapter, request.end_given, request.run.allocation)
    own_bias = [ahead or one.has_constant for one, ahead in zip(surveys, ahead, strict=True)]
    has_bias = any(own_bias)  # states that are carried together have the same extras
    parts = [replace(at_layer(request, kind), has_bias=has_bias) for kind in kinds]
    readout = Readout.of(request, directions)
    check_found(request, target=readout.names)
    collected, first = [], 0
    for state, errors in _carried(parts, surveys):
        collected.append(readout.collect(parts[first : first + len(errors)], state, errors))
        first += len(errors)
    by_layer = [
        results if has_own else [[_without_bias(result) for result in of_prompt] for of_prompt in results]
        for has_own, results in zip(own_bias, to_results(collected), strict=True)
    ]
    return [
        [LayeredAttribution(list(each), warnings=warnings_of_layers(each)) for each in zip(*of_prompt, strict=True)]
        for of_prompt in zip(*by_layer, strict=True)
    ]


def _ready(request: Request, kinds: Sequence[ComponentKind]) -> tuple[Request, list[Survey]]:
    """Return the request with its trace and with one workspace that serves the states of all ``kinds``; their surveys.

    The first layer's state passes most layers. It is planned with as many components as the largest has.
    """
    adapter, longest = request.adapter, at_layer(request, kinds[0])
    counts = [[named_components(kind, adapter, carried) for carried in request.carried] for kind in kinds]
    are_known = all(is_known for of_kind in counts for _, is_known in of_kind)
    most = [max(count for count, _ in of_prompt) for of_prompt in zip(*counts, strict=True)]
    request = with_trace(replace(request, run=fit(longest, most if are_known else None).run))
    surveys = [survey(request, kind) for kind in kinds]
    if not are_known:
        longest = replace(longest, run=request.run, trace=request.require_trace())
        request = replace(request, run=fit(longest, largest(surveys)).run)
    return request, surveys


def _carried(
    parts: Sequence[Request], surveys: Sequence[Survey]
) -> Iterator[tuple[ComponentState, list[list[Tensor]]]]:
    """Yield states at the end, each of one layer's components or of several layers', and each layer's errors."""
    first = parts[0]
    adapter, trace, end, run = first.adapter, first.require_trace(), first.end, first.run
    reads = first.read_positions
    if not can_propagate_jointly(trace, run):
        for part in parts:
            state = start(part)
            check_found(part, components=[one.all.labels for one in state.layout.components])
            state, errors = propagate(adapter, trace, state, end, run, reads)
            yield state, [errors]
        return
    starts = (_pending(part, one.counts) for part, one in zip(parts, surveys, strict=True))
    for group in _groups(starts, first):
        states, errors = carry_jointly(adapter, trace, group, end, run, reads)
        if run.verifier is not None:  # every layer's readout is looked at
            states = [one for state in states for one in state.apart()]
        done = 0
        for state in states:
            count = len(state.layout.apart())
            yield state, errors[done : done + count]
            done += count


def _groups(starts: Iterator[PendingState], request: Request) -> Iterator[list[PendingState]]:
    """Group neighbours that fit into memory together and have the same extras.

    Components that may be complete have a `rest` or none, which only their state tells. It is made at once, then.
    """
    backend = request.run.backend
    for group in group_by_memory(starts):
        if len(group) == 1 or not request.components.may_be_complete:
            yield group
            continue
        states = [backend.prepare(one.device, one.make) for one in group]
        for _, alike in groupby(states, key=lambda state: state.layout.components[0].extras):
            yield [PendingState.of(state) for state in alike]


def _pending(part: Request, counts: Sequence[int]) -> PendingState:
    """Return the state of one layer before it is made: where it enters, and how large it will be.

    ``counts`` are the named components of every prompt.
    """
    rows = sum((count + 1 + part.has_bias) * carried for count, carried in zip(counts, part.carried, strict=True))
    nbytes = rows * part.require_trace().resid_final.shape[1] * part.run.state_dtype.itemsize
    device = part.adapter.layer_device(part.layer)
    return PendingState(part.components.entry(part.adapter).layer, nbytes, device, lambda: start(part))


def _without_bias(result: Attribution) -> Attribution:
    """Return a result without `bias`, which is zero: it is there for the sake of other layers."""
    if result.labels[-1] != BIAS:
        return result
    return replace(result, scores=result.scores[..., :-1], labels=result.labels[:-1])
