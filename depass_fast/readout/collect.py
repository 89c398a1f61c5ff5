"""The readout of states at the last layer: targets are resolved once per trace, all states are copied at once.

Every copy to the host waits for all that a GPU has to do. So the targets are looked at before the layer loop, when it
has nothing to do, and the scores when everything is on its way: how often it is waited for does not depend on how many
prompts or layers there are.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..adapters import Norm
from ..inputs.targets import TargetSpec
from ..request import Request, wide_dtype
from ..results.attribution import Attribution
from ..results.verification import Verification, warn_if_off
from ..runtime.dtypes import dtype_name
from ..runtime.precision import full_precision
from ..runtime.transfer import to_host
from ..state.layout import Components
from ..state.state import ComponentState
from .assemble import assemble
from .targets import Directions, read_scores, resolve_targets


@dataclass(frozen=True)
class Readout:
    """The directions that are read at every place of a trace; a place is a prompt and a position of it.

    ``logits`` (K,) are the model's own, in host memory. ``resid`` (T, D) is what the final ``norm`` reads; without a
    norm the state itself is read.
    """

    places: tuple[tuple[int, int], ...]
    directions: tuple[Directions, ...]
    logits: tuple[Tensor, ...]
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
        hidden = [final[trace.span(prompt)][position] for prompt, position in places]
        directions = resolve_targets(targets, adapter, request.tokenizer, hidden, dtype)
        logits = [one.vectors @ h.to(dtype) + one.constants for one, h in zip(directions, hidden, strict=True)]
        norm = None if norm is None else norm.to(device)
        return Readout(tuple(places), tuple(directions), tuple(to_host(logits)), norm, resid, dtype)

    def only(self, place: int) -> Readout:
        """Return the readout of one of the places."""
        one = slice(place, place + 1)
        return replace(self, places=self.places[one], directions=self.directions[one], logits=self.logits[one])

    @full_precision()
    def collect(self, request: Request, state: ComponentState, errors: list[Tensor]) -> Collected:
        """Read a state that holds one position of every prompt, the places' own.

        ``errors`` are the completeness errors (P,) at the start and after every layer.
        """
        state.rows = state.rows.to(self.resid.device, self.dtype)
        scores = read_scores(state, request.run.operations, self.norm, self.resid, self.directions)
        return Collected(self, request, state.layout.components, scores, errors, request.run.verified())


@dataclass(frozen=True)
class Collected:
    """Scores (K, M) of every place and completeness errors (P,) of every layer, still on the device."""

    readout: Readout
    request: Request
    components: Sequence[Components]
    scores: list[Tensor]
    errors: list[Tensor]
    verification: Verification | None


def to_results(collected: Sequence[Collected]) -> list[list[Attribution]]:
    """Return a result per place, for every one that was ``collected``. They belong to one call of the user's."""
    held = to_host([tensor for one in collected for tensor in (*one.scores, *one.errors)])
    seconds = time.perf_counter() - collected[0].request.began
    results, first = [], 0
    for one in collected:
        middle, last = first + len(one.scores), first + len(one.scores) + len(one.errors)
        results.append(_results(one, held[first:middle], torch.stack(held[middle:last]), seconds))
        first = last
    return results


def how_computed(request: Request) -> dict[str, Any]:
    """Return the fields of an :class:`Attribution` that say how it was computed."""
    adapter, run = request.adapter, request.run
    return {
        "components": request.components.kind,
        "allocation": run.allocation.name,
        "temperature": run.allocation.temperature,
        "backend": run.backend.name,
        "device": str(adapter.device),
        "dtype": dtype_name(adapter.dtype),
    }


def _results(one: Collected, scores: Sequence[Tensor], errors: Tensor, seconds: float) -> list[Attribution]:
    """Return a result per place, from its scores and all prompts' errors (layers, P) in host memory."""
    request, readout, run = one.request, one.readout, one.request.run
    return [
        assemble(
            scores=scores[i],
            logits=readout.logits[i],
            layer_errors=errors[:, prompt].contiguous(),
            directions=readout.directions[i],
            labels=one.components[i].labels,
            input_ids=request.prompts[prompt].tolist(),
            tokens=request.tokens[prompt],
            layer=request.layer,
            position=position,
            seconds=seconds,
            memory_budget=run.workspace(request.adapter.device),
            verification=one.verification,
            warnings=warn_if_off(one.verification, run.backend.name),
            **how_computed(request),
        )
        for i, (prompt, position) in enumerate(readout.places)
    ]
