"""Exact attribution for components of several layers: a decomposition per layer, in one sweep where possible."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from ..components.base import ComponentKind
from ..components.model import Neurons
from ..components.start import each_meets_bias
from ..labels import BIAS
from ..planning.shapes import named_components
from ..propagation.joint import PendingState, can_propagate_jointly, carry_jointly, group_by_memory
from ..propagation.loop import propagate
from ..readout.collect import Readout, to_results
from ..readout.targets import Directions
from ..request import Request, fit, start, with_trace
from ..results.attribution import Attribution
from ..results.layered import LayeredAttribution
from ..state.state import ComponentState


def layers(request: Request, directions: Sequence[Directions] | None = None) -> list[list[LayeredAttribution]]:
    """Return a result per read of every prompt, of all layers; ``directions`` stand for the targets."""
    adapter, kinds = request.adapter, request.components.each(request.adapter)
    request = _ready(request, kinds)
    own_bias = [
        ahead or kind.constant(adapter, request.require_trace(), 0, request.run.state_dtype) is not None
        for kind, ahead in zip(kinds, each_meets_bias(kinds, adapter, request.end_given), strict=True)
    ]
    has_bias = any(own_bias)  # states that are carried together have the same extras
    parts = [replace(request, components=kind, layer=kind.resolve(adapter), has_bias=has_bias) for kind in kinds]
    readout = Readout.of(request, directions)
    collected, first = [], 0
    for state, errors in _carried(parts):
        collected.append(readout.collect(parts[first : first + len(errors)], state, errors))
        first += len(errors)
    by_layer = [
        results if has_own else [[_without_bias(result) for result in of_prompt] for of_prompt in results]
        for has_own, results in zip(own_bias, to_results(collected), strict=True)
    ]
    return [
        [LayeredAttribution(list(each), warnings=_warnings(each)) for each in zip(*of_prompt, strict=True)]
        for of_prompt in zip(*by_layer, strict=True)
    ]


def _ready(request: Request, kinds: Sequence[ComponentKind]) -> Request:
    """Return the request with its trace, and with one workspace that serves the states of all ``kinds``."""
    adapter = request.adapter
    longest = replace(request, components=kinds[0], layer=kinds[0].resolve(adapter))  # it passes most layers
    request = with_trace(replace(request, run=fit(longest).run))
    if all(named_components(kind, adapter, 1)[1] for kind in kinds):
        return request
    trace = request.require_trace()
    counts = [_counts(kind, request) for kind in kinds]
    largest = [max(of_prompt) for of_prompt in zip(*counts, strict=True)]
    return replace(request, run=fit(replace(longest, run=request.run, trace=trace), largest).run)


def _counts(kind: ComponentKind, request: Request) -> list[int]:
    """Return how many named components every prompt of a traced request has."""
    count, is_known = named_components(kind, request.adapter, 1)
    if is_known:
        return [count] * len(request.prompts)
    assert isinstance(kind, Neurons), "of the kinds for several layers, only experts' neurons depend on the prompt"
    return kind.counts(request.adapter, request.require_trace())


def _carried(parts: Sequence[Request]) -> Iterator[tuple[ComponentState, list[list[Tensor]]]]:
    """Yield states at the end, each of one layer's components or of several layers', and each layer's errors."""
    first = parts[0]
    adapter, trace, end, run = first.adapter, first.require_trace(), first.end, first.run
    reads = first.read_positions
    if not can_propagate_jointly(trace, run):
        for part in parts:
            state, errors = propagate(adapter, trace, start(part), end, run, reads)
            yield state, [errors]
        return
    for group in group_by_memory(_pending(part) for part in parts):
        states, errors = carry_jointly(adapter, trace, group, end, run, reads)
        if run.verifier is not None:  # every layer's readout is looked at
            states = [one for state in states for one in state.apart()]
        done = 0
        for state in states:
            count = len(state.layout.apart())
            yield state, errors[done : done + count]
            done += count


def _pending(part: Request) -> PendingState:
    """Return the state of one layer before it is made: where it enters, and how large it will be."""
    rows = sum(
        (count + 1 + part.has_bias) * carried
        for count, carried in zip(_counts(part.components, part), part.carried, strict=True)
    )
    nbytes = rows * part.require_trace().resid_final.shape[1] * part.run.state_dtype.itemsize
    device = part.adapter.layer_device(part.layer)
    return PendingState(part.components.entry(part.adapter).layer, nbytes, device, lambda: start(part))


def _warnings(results: Sequence[Attribution]) -> list[str] | None:
    """Return the warnings of all layers, each once."""
    return list(dict.fromkeys(text for result in results for text in result.warnings or [])) or None


def _without_bias(result: Attribution) -> Attribution:
    """Return a result without `bias`, which is zero: it is there for the sake of other layers."""
    if result.labels[-1] != BIAS:
        return result
    return replace(result, scores=result.scores[..., :-1], labels=result.labels[:-1])
