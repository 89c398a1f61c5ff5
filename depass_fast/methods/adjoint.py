"""`attribute` by the adjoint sweep, for one or several layers."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..adjoint.estimate import ApproximationWarning, warnings_of
from ..adjoint.forward import LEAST_TEMPERATURE, Settings
from ..adjoint.maps import LayerStack
from ..adjoint.starts import make_start
from ..adjoint.sweep import Scores, Sweep
from ..components.base import ComponentKind
from ..components.start import meet_bias
from ..inputs.targets import TargetSpec
from ..labels import BIAS, REST
from ..options import Adjoint
from ..readout.targets import Directions, resolve_target
from ..request import Request, bind
from ..results.attribution import Attribution
from ..results.layered import LayeredAttribution
from ..runtime.progress import progress_bar
from ..trace.record import Trace

if TYPE_CHECKING:
    from ..engine import DePass


def by_adjoint(
    engine: DePass, plan: Request, reads: Sequence[int], specs: Sequence[TargetSpec], method: Adjoint, began: float
) -> list[Attribution] | list[LayeredAttribution]:
    """A result per prompt: every layer that ``plan`` names, in one sweep per prompt."""
    adapter, trace = engine.adapter, plan.trace or engine._capture(plan.prompts, plan.run.progress)
    kinds = plan.components.each(adapter)
    if not plan.components.is_layered:
        plan = bind(plan, adapter, trace, method)
    results = []
    with progress_bar("prompts", trace.n_prompts, plan.run.progress) as shown:
        for p in range(trace.n_prompts):
            results.append(_one(engine, plan, kinds, trace, p, reads[p], specs[p], method, began))
            if shown is not None:
                shown.finish()
    return results


def _one(
    engine: DePass,
    plan: Request,
    kinds: Sequence[ComponentKind],
    trace: Trace,
    prompt: int,
    read: int,
    spec: TargetSpec,
    method: Adjoint,
    began: float,
) -> Attribution | LayeredAttribution:
    adapter, run = engine.adapter, plan.run
    wide = torch.promote_types(run.state_dtype, torch.float32)
    directions, seeds, logits, constants = _readout(engine, plan, trace, prompt, read, spec, wide)
    n = read + 1
    ahead = meet_bias(kinds, adapter, plan.end_given)
    bound = None if plan.bound is None else plan.bound[prompt]  # of one layer
    starts = [make_start(kind, adapter, trace, prompt, n, b, wide, bound) for kind, b in zip(kinds, ahead, strict=True)]
    starts.sort(key=lambda start: start.entering)  # those under way at a layer are then always the first ones
    compute = run.compute_dtype or wide
    road = LayerStack(adapter, trace, prompt, n, plan.end, wide, compute)
    temperature = max(run.allocation.temperature, LEAST_TEMPERATURE) if run.allocation.is_softmax else None
    settings = Settings(temperature, seed=method.seed)
    sweep = Sweep(road, starts, seeds, settings, run.memory_budget)
    scores = sweep.run(method)
    results = _assemble(engine, plan, sweep, scores, directions, logits.cpu(), constants.cpu(), prompt, read, began)
    estimate = None if scores.estimate is None else scores.estimate.as_dict()
    said = warnings_of(estimate, max(result.completeness_error for result in results))
    if said:
        warnings.warn(f"adjoint scores: {'; '.join(said)}", ApproximationWarning, stacklevel=5)
    if plan.components.is_layered:
        return LayeredAttribution(results, estimate, said)
    return replace(results[0], estimate=estimate, warnings=said)


def _readout(
    engine: DePass, plan: Request, trace: Trace, prompt: int, read: int, spec: TargetSpec, wide: torch.dtype
) -> tuple[Directions, Tensor, Tensor, Tensor]:
    """The directions; the same as gradients (K, D) of the state that enters the end; logits and constants (K,)."""
    adapter = engine.adapter
    device = adapter.unembedding.weight.device
    at = trace.span(prompt).start + read
    resid = trace.resid(plan.end)[at].to(device)
    if plan.end_given is not None:
        directions = resolve_target(spec, adapter, engine.tokenizer, resid, wide)
        return directions, directions.vectors, directions.vectors @ resid.to(wide), directions.constants
    norm, final = adapter.final_norm(), trace.normed_final[at].to(device)
    directions = resolve_target(spec, adapter, engine.tokenizer, final, wide)
    constants, seeds = directions.constants, directions.vectors
    if norm is not None:
        norm = norm.to(device)
        if norm.bias is not None:
            constants = constants + directions.vectors @ norm.bias.to(wide)
        seeds = norm.fold(seeds, torch.empty_like(seeds)) * norm.scale(resid.to(wide)).to(wide)
    return directions, seeds, directions.vectors @ final.to(wide) + directions.constants, constants


def _assemble(
    engine: DePass,
    plan: Request,
    sweep: Sweep,
    scores: Scores,
    directions: Directions,
    logits: Tensor,
    constants: Tensor,
    prompt: int,
    read: int,
    began: float,
) -> list[Attribution]:
    """A result per start, in order of layers."""
    results = []
    for s, start in enumerate(sweep.starts):
        columns, labels = [scores.named[s]], list(start.names)
        if start.rest is not None:
            columns.append(scores.rest[s][:, None])
            labels.append(REST)
        if start.has_bias:
            columns.append((scores.bias[s] + constants)[:, None])
            labels.append(BIAS)
        results.append(
            Attribution.assemble(
                scores=torch.cat(columns, dim=1),
                logits=logits,
                layer_errors=torch.zeros(0, device="cpu"),
                directions=directions,
                labels=labels,
                input_ids=plan.prompts[prompt].tolist(),
                tokens=plan.tokens[prompt],
                components=plan.components.kind,
                layer=start.layer,
                position=read,
                allocation=plan.run.allocation.name,
                temperature=plan.run.allocation.temperature,
                backend=plan.run.backend.name,
                device=str(engine.adapter.device),
                dtype=str(engine.adapter.dtype).removeprefix("torch."),
                seconds=0.0,
                method="adjoint",
            )
        )
    for result in results:
        result.seconds = time.perf_counter() - began
    return results
