"""Attribution by the adjoint sweep, for components of one or several layers (docs/adjoint.md)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..adjoint.approximation import LEAST_TEMPERATURE, Approximation
from ..adjoint.estimate import MOST_INCOMPLETE, warnings_of
from ..adjoint.stack import LayerStack
from ..adjoint.starts import Start, make_start
from ..adjoint.sweep import Scores, Sweep
from ..components.base import ComponentKind
from ..components.features import Features
from ..components.start import each_meets_bias
from ..labels import BIAS, REST
from ..options import Adjoint
from ..readout.assemble import assemble
from ..readout.collect import how_computed, read_directions
from ..readout.completeness import off_the_logit, rounding_of
from ..readout.targets import Directions
from ..request import Request, fit, traced, wide_dtype, with_trace
from ..results.attribution import Attribution
from ..results.estimate import ApproximationWarning
from ..results.layered import LayeredAttribution
from ..runtime.log import warn_user
from ..runtime.progress import progress_bar
from .survey import largest, survey


def adjoint(
    request: Request, directions: Sequence[Directions] | None = None
) -> list[list[Attribution]] | list[list[LayeredAttribution]]:
    """Return a result per read of every prompt, of every layer that the components name: a sweep for each read.

    ``directions``, one per read, stand for the targets.
    """
    request, kinds = fit(request), request.components.each(request.adapter)
    if request.components.is_layered:
        request = with_trace(request)
        if isinstance(kinds[0], Features):  # only now it is known how many components there are
            request = fit(request, largest([survey(request, kind) for kind in kinds]))
    else:
        request = traced(request)
    places, directions = request.places, directions or read_directions(request)
    found = []
    what = "prompts" if len(places) == len(request.prompts) else "positions"
    with progress_bar(what, len(places), request.run.progress) as bar:
        for place, (prompt, position) in enumerate(places):
            found.append(_one_read(request, kinds, prompt, position, directions[place]))
            if bar is not None:
                bar.finish()
    results = iter(found)
    return [[next(results) for _ in reads] for reads in request.reads]


def _one_read(
    request: Request, kinds: Sequence[ComponentKind], prompt: int, position: int, directions: Directions
) -> Attribution | LayeredAttribution:
    assert request.method is not None
    end = _End.of(request, prompt, position, directions)
    sweep = _sweep(request, kinds, prompt, position, end.seeds, request.method)
    scores = sweep.run(request.method)
    results = _results(request, sweep.starts, scores, end, prompt, position)
    computed = request.run.compute_dtype or wide_dtype(request)
    most = min(MOST_INCOMPLETE, rounding_of(request.adapter, request.run, computed).limit)
    sizes = end.sizes.cpu()
    said = warnings_of(scores.estimate, max(off_the_logit(result, sizes) for result in results), most)
    if said:
        warn_user(f"adjoint scores: {'; '.join(said)}", ApproximationWarning)
    if request.components.is_layered:
        return LayeredAttribution(results, scores.estimate, said)
    return replace(results[0], estimate=scores.estimate, warnings=said)


@dataclass(frozen=True)
class _End:
    """The readout of one position: ``directions``, and ``seeds`` (K, D), the same as gradients of the state at the end.

    ``logits`` and ``constants`` (K,) are the model's own logits, and the part of them that belongs to `bias`.
    ``sizes`` (K,) are those of the products that a logit is the sum of, for its rounding.
    """

    directions: Directions
    seeds: Tensor
    logits: Tensor
    constants: Tensor
    sizes: Tensor

    @staticmethod
    def of(request: Request, prompt: int, position: int, found: Directions) -> _End:
        adapter, trace, wide = request.adapter, request.require_trace(), wide_dtype(request)
        device = adapter.unembedding_device
        at = trace.span(prompt).start + position
        resid = trace.resid(request.end)[at].to(device)
        if request.end_given is not None:
            sizes = (found.vectors * resid.to(wide)).norm(dim=1)
            return _End(found, found.vectors, found.vectors @ resid.to(wide), found.constants, sizes)
        norm, final = adapter.final_norm(), trace.normed_final[at].to(device)
        seeds, constants = found.vectors, found.constants
        if norm is not None:
            norm = norm.to(device)
            if norm.bias is not None:
                constants = constants + found.vectors @ norm.bias.to(wide)
            seeds = norm.fold(seeds, torch.empty_like(seeds)) * norm.scale(resid.to(wide)).to(wide)
        sizes = (found.vectors * final.to(wide)).norm(dim=1)
        return _End(found, seeds, found.vectors @ final.to(wide) + found.constants, constants, sizes)


def _sweep(
    request: Request, kinds: Sequence[ComponentKind], prompt: int, position: int, seeds: Tensor, method: Adjoint
) -> Sweep:
    """Return the sweep of one prompt over the layers of ``kinds``, read in ``seeds`` (K, D) at ``position``."""
    adapter, trace, run, wide = request.adapter, request.require_trace(), request.run, wide_dtype(request)
    n = position + 1
    bound = None if request.bound is None else request.bound[prompt]  # of one layer
    starts = [
        make_start(kind, adapter, trace, prompt, n, has_bias, wide, bound)
        for kind, has_bias in zip(
            kinds, each_meets_bias(kinds, adapter, request.end_given, run.allocation), strict=True
        )
    ]
    starts.sort(key=lambda start: start.entering)  # those under way at a layer are then always the first ones
    compute = run.compute_dtype or wide
    stack = LayerStack(adapter, trace, prompt, n, request.end, wide, compute)
    temperature = max(run.allocation.temperature, LEAST_TEMPERATURE)
    return Sweep(stack, starts, seeds, Approximation(temperature, seed=method.seed), run.memory_budget)


def _results(
    request: Request, starts: Sequence[Start], scores: Scores, end: _End, prompt: int, position: int
) -> list[Attribution]:
    """Return a result per start, in order of layers."""
    results, logits, constants = [], end.logits.cpu(), end.constants.cpu()
    for s, start in enumerate(starts):
        columns, labels = [scores.named[s]], list(start.names)
        if start.rest is not None:
            columns.append(scores.rest[s][:, None])
            labels.append(REST)
        if start.has_bias:
            columns.append((scores.bias[s] + constants)[:, None])
            labels.append(BIAS)
        results.append(
            assemble(
                scores=torch.cat(columns, dim=1),
                logits=logits,
                layer_errors=torch.zeros(0, device="cpu"),
                directions=end.directions,
                labels=labels,
                input_ids=request.prompts[prompt].tolist(),
                tokens=request.tokens[prompt],
                layer=start.layer,
                position=position,
                seconds=0.0,
                method="adjoint",
                **how_computed(request, prompt),
            )
        )
    seconds = time.perf_counter() - request.began
    for result in results:
        result.seconds = seconds
    return results
