"""The readout of states at the last layer: targets are resolved once per trace, all states are copied at once.

Every copy to the host waits for all that a GPU has to do. So the targets are looked at before the layer loop, when it
has nothing to do, and the scores when everything is on its way: how often it is waited for does not depend on how many
prompts or layers there are.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..adapters import Norm
from ..inputs.targets import TargetSpec
from ..request import Request, wide_dtype
from ..results.attribution import Attribution
from ..results.verification import Verification, warn_if_off
from ..runtime.dtypes import dtype_name
from ..runtime.precision import full_precision
from ..runtime.transfer import to_device, to_host
from ..state.layout import Components, Layout
from ..state.state import ComponentState
from .assemble import assemble
from .targets import Directions, bias_scores, read_scores, resolve_targets, scores_of


@dataclass(frozen=True)
class Readout:
    """The directions that are read at every place of a trace; a place is a prompt and a position of it.

    ``logits`` (K,) are the model's own, ``bias_scores`` (K,) what the readout adds to the score of `bias`, both in host
    memory. ``resid`` (T, D) is what the final ``norm`` reads; without a norm the state itself is read.
    """

    places: tuple[tuple[int, int], ...]
    directions: tuple[Directions, ...]
    logits: tuple[Tensor, ...]
    bias_scores: tuple[Tensor, ...]
    norm: Norm | None
    resid: Tensor
    dtype: torch.dtype

    @staticmethod
    @full_precision()
    def of(request: Request, places: Sequence[tuple[int, int]], targets: Sequence[TargetSpec]) -> Readout:
        """Resolve a target for each of the ``places`` of a traced request.

        Raises:
            ValueError: an unembedding row holds NaN or inf.
        """
        adapter, trace, final_norm = request.adapter, request.require_trace(), request.end_given is None
        device, norm = adapter.unembedding_device, adapter.final_norm() if final_norm else None
        dtype = wide_dtype(request)
        resid = trace.resid(request.end).to(device)
        final = trace.normed_final.to(device) if final_norm else resid
        at = np.array([trace.offsets[prompt] + position for prompt, position in places])
        hidden = final[to_device(at, device)]  # (P, D)
        directions = resolve_targets(targets, adapter, request.tokenizer, hidden, dtype)
        norm = None if norm is None else norm.to(device)
        logits, constants = to_host([_logits(directions, hidden), bias_scores(directions, norm)])
        widths = [len(one.vectors) for one in directions]
        return Readout(
            places=tuple(places),
            directions=tuple(directions),
            logits=logits.split(widths),
            bias_scores=constants.split(widths),
            norm=norm,
            resid=resid,
            dtype=dtype,
        )

    def only(self, place: int) -> Readout:
        """Return the readout of one of the places."""
        one = slice(place, place + 1)
        chosen = {name: getattr(self, name)[one] for name in ("places", "directions", "logits", "bias_scores")}
        return replace(self, **chosen)

    @full_precision()
    def collect(
        self, requests: Sequence[Request], state: ComponentState, errors: Sequence[Sequence[Tensor]]
    ) -> Collected:
        """Read a state that holds one position of every prompt, the places' own: one decomposition, or joint ones.

        There are a request and ``errors`` for each decomposition: its completeness errors (P,) at the start and after
        every layer.
        """
        run = requests[0].run
        state.rows = state.rows.to(self.resid.device, self.dtype)
        scores = read_scores(state, run.operations, self.norm, self.resid, self.directions)
        return Collected(self, requests, state.layout, scores, errors, run.verified())


@dataclass(frozen=True)
class Collected:
    """The scores (n,) of a state's rows and the completeness errors of its decompositions, still on the device."""

    readout: Readout
    requests: Sequence[Request]
    layout: Layout
    scores: Tensor
    errors: Sequence[Sequence[Tensor]]
    verification: Verification | None


def to_results(collected: Sequence[Collected]) -> list[list[Attribution]]:
    """Return a result per place, for every decomposition that was ``collected``. They belong to one call of the user's.

    All are copied at once.
    """
    held = iter(to_host([x for one in collected for x in (one.scores, *(e for many in one.errors for e in many))]))
    seconds, results = time.perf_counter() - collected[0].requests[0].began, []
    for one in collected:
        layout, readout, n = one.layout, one.readout, len(one.readout.places)
        widths = [len(constants) for constants in readout.bias_scores] * len(one.requests)
        alive = layout.counts[np.argsort(layout.prompt, kind="stable")]
        parts = next(held).split((alive * widths).tolist())
        scores = [
            scores_of(part, components, readout.bias_scores[i % n])
            for i, (part, components) in enumerate(zip(parts, layout.components, strict=True))
        ]
        for d, (request, many) in enumerate(zip(one.requests, one.errors, strict=True)):
            errors = torch.stack([next(held) for _ in many])
            here = slice(d * n, (d + 1) * n)
            results.append(_results(one, request, layout.components[here], scores[here], errors, seconds))
    return results


def how_computed(request: Request, prompt: int) -> dict[str, Any]:
    """Return the fields of an :class:`Attribution` of a prompt that say how it was computed."""
    adapter, run, kind = request.adapter, request.run, request.components
    return {
        "components": kind.kind,
        "allocation": run.allocation.name,
        "temperature": run.allocation.temperature,
        "exclude_special": sorted(request.excluded[prompt]) if kind.kind == "tokens" else [],
        "backend": run.backend.name,
        "device": str(adapter.device),
        "dtype": dtype_name(adapter.dtype),
        "state_dtype": dtype_name(run.state_dtype),
        "compute_dtype": _products(request),
        "site": kind.site,
        "end": request.end_given,
        "sweep": None if request.method is None else asdict(request.method),
        "provenance": request.provenance,
    }


def _products(request: Request) -> str:
    """Return the dtype of the products by its name, as far as one dtype says it."""
    adapter, run = request.adapter, request.run
    dtype = run.compute_dtype or (run.state_dtype if request.method is None else wide_dtype(request))
    scales = run.backend.name == "triton" and request.settings.takes_float16(adapter.dtype, adapter.device)
    return f"float16 with scales, or {dtype_name(dtype)}" if scales and request.method is None else dtype_name(dtype)


def _results(
    one: Collected,
    request: Request,
    components: Sequence[Components],
    scores: Sequence[Tensor],
    errors: Tensor,
    seconds: float,
) -> list[Attribution]:
    """Return a result per place, from its scores and all prompts' errors (layers, P) in host memory."""
    readout, run = one.readout, request.run
    return [
        assemble(
            scores=scores[i],
            logits=readout.logits[i],
            layer_errors=errors[:, prompt].contiguous(),
            directions=readout.directions[i],
            labels=components[i].labels,
            input_ids=request.prompts[prompt].tolist(),
            tokens=request.tokens[prompt],
            layer=request.layer,
            position=position,
            seconds=seconds,
            memory_budget=run.workspace(request.adapter.device),
            verification=one.verification,
            warnings=warn_if_off(one.verification, run.backend.name),
            **how_computed(request, prompt),
        )
        for i, (prompt, position) in enumerate(readout.places)
    ]


def _logits(directions: Sequence[Directions], hidden: Tensor) -> Tensor:
    """Return the model's own logits (ΣK,) in the directions of every place's hidden state (P, D)."""
    widths = [len(one.vectors) for one in directions]
    vectors, constants = (torch.cat([getattr(one, name) for one in directions]) for name in ("vectors", "constants"))
    if max(widths) > 1:
        hidden = hidden[to_device(np.repeat(np.arange(len(widths)), widths), hidden.device)]
    return (vectors * hidden.to(vectors.dtype)).sum(1) + constants
