"""From states at the end of their way to results: targets are resolved once per trace, all states are copied at once.

Every copy to the host waits for all that a GPU has to do. So the targets are looked at before the layer loop, when it
has nothing to do, and the scores when everything is on its way: how often it is waited for does not depend on how many
prompts or layers there are.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..adapters import Norm
from ..inputs.targets import TargetSpec
from ..results.attribution import Attribution
from ..results.verification import Verification, warned
from ..runtime.transfer import to_host
from ..state.layout import Components
from ..state.state import ComponentState
from .targets import Directions, read_scores, resolve_targets

if TYPE_CHECKING:
    from ..engine import DePass
    from ..request import Request


@dataclass(frozen=True)
class Readout:
    """What is read of the states of a trace: at every place, a prompt and a position of it, some directions.

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
    def of(engine: DePass, call: Request, places: Sequence[tuple[int, int]], specs: Sequence[TargetSpec]) -> Readout:
        """At ``places`` of the call's trace, a target for each.

        Raises:
            ValueError: an unembedding row holds NaN or inf.
        """
        adapter, trace, final_norm = engine.adapter, call.trace, call.end_given is None
        device, norm = adapter.unembedding_device, adapter.final_norm() if final_norm else None
        dtype = torch.promote_types(call.run.state_dtype, torch.float32)  # no share is rounded to half precision
        resid = trace.resid(call.end).to(device)
        final = trace.normed_final.to(device) if final_norm else resid
        hidden = [final[trace.span(prompt)][position] for prompt, position in places]
        directions = resolve_targets(specs, adapter, engine.tokenizer, hidden, dtype)
        logits = [one.vectors @ h.to(dtype) + one.constants for one, h in zip(directions, hidden, strict=True)]
        norm = None if norm is None else norm.to(device)
        return Readout(tuple(places), tuple(directions), tuple(to_host(logits)), norm, resid, dtype)

    def only(self, place: int) -> Readout:
        """At one of the places."""
        one = slice(place, place + 1)
        return replace(self, places=self.places[one], directions=self.directions[one], logits=self.logits[one])

    def read(self, call: Request, state: ComponentState, errors: list[Tensor]) -> Collected:
        """Of a state with one position of each prompt, the places' own; ``errors`` (P,) are those on its way."""
        state.rows = state.rows.to(self.resid.device, self.dtype)
        scores = read_scores(state, call.run.steps, self.norm, self.resid, self.directions)
        return Collected(self, call, state.layout.components, scores, errors, call.run.verified())


@dataclass(frozen=True)
class Collected:
    """Scores (K, M) of every place and the completeness errors (P,) of every layer, still on the device."""

    aim: Readout
    call: Request
    components: Sequence[Components]
    scores: list[Tensor]
    errors: list[Tensor]
    found: Verification | None


def to_results(engine: DePass, readings: Sequence[Collected], began: float) -> list[list[Attribution]]:
    """A result per place, of every reading."""
    held = to_host([tensor for one in readings for tensor in (*one.scores, *one.errors)])
    adapter, results, first = engine.adapter, [], 0
    same = {"device": str(adapter.device), "dtype": str(adapter.dtype).removeprefix("torch.")}
    same["seconds"] = time.perf_counter() - began
    for one in readings:
        middle, last = first + len(one.scores), first + len(one.scores) + len(one.errors)
        same["memory_budget"] = one.call.run.workspace(adapter.device)
        results.append(_results(one, held[first:middle], torch.stack(held[middle:last]), same))
        first = last
    return results


def _results(reading: Collected, scores: Sequence[Tensor], errors: Tensor, same: dict[str, Any]) -> list[Attribution]:
    """A result per place, from its scores and all prompts' errors (layers, P) in host memory."""
    call, aim, run = reading.call, reading.aim, reading.call.run
    same = same | {
        "components": call.components.kind,
        "layer": call.layer,
        "allocation": run.allocation.name,
        "temperature": run.allocation.temperature,
        "backend": run.backend.name,
        "verification": reading.found,
    }
    return [
        Attribution.assemble(
            scores=scores[i],
            logits=aim.logits[i],
            layer_errors=errors[:, prompt].contiguous(),
            directions=aim.directions[i],
            labels=reading.components[i].labels,
            input_ids=call.prompts[prompt].tolist(),
            tokens=call.tokens[prompt],
            position=position,
            warnings=warned(reading.found, run.backend.name),
            **same,
        )
        for i, (prompt, position) in enumerate(aim.places)
    ]
