"""`attribute` for components of several layers, exactly: a decomposition per layer, all in one sweep where possible."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from ..components.start import meet_bias
from ..inputs.targets import TargetSpec
from ..labels import BIAS
from ..planning.shapes import named_components
from ..propagation.joint import PendingState, can_propagate_jointly, group_by_memory, propagate_jointly
from ..readout.collect import Readout, to_results
from ..request import fit
from ..results.attribution import Attribution
from ..results.layered import LayeredAttribution
from ..state.state import ComponentState

if TYPE_CHECKING:
    from ..engine import DePass
    from ..request import Request


def exact_layers(
    engine: DePass, plan: Request, reads: Sequence[int], specs: Sequence[TargetSpec], began: float
) -> list[LayeredAttribution]:
    """A result per prompt, of every layer that ``plan`` names."""
    adapter, kinds = engine.adapter, plan.components.each(engine.adapter)
    first = kinds[0].resolve(adapter)  # which has the longest way to go
    plan = replace(plan, run=fit(replace(plan, components=kinds[0], layer=first), adapter).run)
    trace = plan.trace or engine._capture(plan.prompts, plan.run.progress)
    plans, own_bias = [], []
    for kind, ahead in zip(kinds, meet_bias(kinds, adapter, plan.end_given), strict=True):
        layer = kind.resolve(adapter)
        bound = kind.bound(adapter, trace, 0)
        constant = bound.constant(adapter, trace, 0, plan.run.state_dtype)
        own_bias.append(constant is not None or ahead)
        plans.append(replace(plan, components=kind, layer=layer, trace=trace))
    plans = [replace(one, has_bias=any(own_bias)) for one in plans]  # joint states have the same extras
    aim = Readout.of(engine, plans[0], list(enumerate(reads)), specs)
    readings = [aim.read(one, *done) for one, done in zip(plans, _carried(engine, plans, reads), strict=True)]
    by_layer = [
        [result if has_bias else _without_bias(result) for result in results]
        for has_bias, results in zip(own_bias, to_results(engine, readings, began), strict=True)
    ]
    return [LayeredAttribution(list(results), warnings=_warnings(results)) for results in zip(*by_layer, strict=True)]


def _carried(
    engine: DePass, plans: Sequence[Request], reads: Sequence[int]
) -> Iterator[tuple[ComponentState, list[Tensor]]]:
    """Every plan's state at the end, and its completeness errors."""
    run, trace, end, at = plans[0].run, plans[0].trace, plans[0].end, [[read] for read in reads]
    if can_propagate_jointly(trace, run):
        for group in group_by_memory(_start(engine, one) for one in plans):
            yield from propagate_jointly(engine.adapter, trace, group, end, run, at)
    else:
        for one in plans:
            yield engine.propagate(trace, engine.start_state(one)[1], end, run, at)


def _start(engine: DePass, plan: Request) -> PendingState:
    """Where a plan's components start, and how large their state will be."""
    adapter, trace, kind = engine.adapter, plan.trace, plan.components
    count, is_known = named_components(kind, adapter, 1)
    counts = [count] * len(plan.tokens) if is_known else kind.counts(adapter, trace)  # only experts' neurons are not
    rows = sum((n + 1 + plan.has_bias) * len(tokens) for n, tokens in zip(counts, plan.tokens, strict=True))
    nbytes = rows * trace.resid_final.shape[1] * plan.run.state_dtype.itemsize
    device = adapter.layer_device(plan.layer)
    return PendingState(kind.entry(adapter).layer, nbytes, device, lambda: engine.start_state(plan)[1])


def _warnings(results: Sequence[Attribution]) -> list[str] | None:
    """What is said of any layer."""
    return list(dict.fromkeys(text for result in results for text in result.warnings or [])) or None


def _without_bias(result: Attribution) -> Attribution:
    """A result without `bias`: if there, it is zero, and was there for the sake of other layers only."""
    if result.labels[-1] != BIAS:
        return result
    return replace(result, scores=result.scores[..., :-1], labels=result.labels[:-1])
