"""The readout of states at the last layer: targets are resolved once per trace, all states are copied at once.

Every copy to the host waits for all that a GPU has to do. So the targets are looked at before the layer loop, when it
has nothing to do, and the scores when everything is on its way: how often it is waited for does not depend on how many
prompts or layers there are.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..adapters import Norm
from ..components.model import Tokens
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
from .completeness import warn_if_results_miss
from .targets import Directions, bias_scores, read_scores, resolve_targets, scores_of


@dataclass(frozen=True)
class Readout:
    """The directions that are read at every place of a trace; a place is a prompt and a position of it.

    ``logits`` (K,) are the model's own, ``bias_scores`` (K,) what the readout adds to the score of `bias`, both in host
    memory. ``sizes`` (K,) are those of the products that a logit is the sum of, for its rounding. ``resid`` (T, D)
    is what the final ``norm`` reads; without a norm the state itself is read.
    """

    places: tuple[tuple[int, int], ...]
    directions: tuple[Directions, ...]
    logits: tuple[Tensor, ...]
    bias_scores: tuple[Tensor, ...]
    sizes: tuple[Tensor, ...]
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
        ids = trace.input_ids[to_device(at, trace.input_ids.device)]
        directions = resolve_targets(targets, adapter, request.tokenizer, ids, hidden, dtype)
        norm = None if norm is None else norm.to(device)
        logits, sizes, constants = to_host([*_logits(directions, hidden), bias_scores(directions, norm)])
        widths = [len(one.vectors) for one in directions]
        return Readout(
            places=tuple(places),
            directions=tuple(directions),
            logits=logits.split(widths),
            bias_scores=constants.split(widths),
            sizes=sizes.split(widths),
            norm=norm,
            resid=resid,
            dtype=dtype,
        )

    def only(self, place: int) -> Readout:
        """Return the readout of one of the places."""
        one = slice(place, place + 1)
        chosen = {name: getattr(self, name)[one] for name in ("places", "directions", "logits", "bias_scores", "sizes")}
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
    sizes = [size for one in collected for _ in one.requests for size in one.readout.sizes]
    warn_if_results_miss(collected[0].requests[0], list(zip(itertools.chain(*results), sizes, strict=True)))
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
    every = [_with_later_tokens(request, readout.places[i][0], components[i], x) for i, x in enumerate(scores)]
    return [
        assemble(
            scores=every[i][1],
            logits=readout.logits[i],
            layer_errors=errors[:, prompt].contiguous(),
            directions=readout.directions[i],
            labels=every[i][0],
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


def _with_later_tokens(
    request: Request, prompt: int, components: Components, scores: Tensor
) -> tuple[list[str], Tensor]:
    """Return labels and scores (K, M) with the tokens behind those that are carried, whose shares are zero."""
    named, carried = len(components.names), request.carried[prompt]
    if not isinstance(request.components, Tokens) or carried == len(request.tokens[prompt]):
        return components.labels, scores
    later = request.components.names(request.adapter, request.tokens[prompt])[carried:]
    zeros = scores.new_zeros(len(scores), len(later))
    parts = scores[:, :named], zeros, scores[:, named:]
    return [*components.names, *later, *components.extras], torch.cat(parts, dim=1)


def _logits(directions: Sequence[Directions], hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return the model's logits (ΣK,) in the directions of every place's hidden state (P, D), and their sizes (ΣK,).

    A size is the norm of the products that are summed up, or what it is on average for states of that norm.
    """
    widths = [len(one.vectors) for one in directions]
    vectors, constants = (torch.cat([getattr(one, name) for one in directions]) for name in ("vectors", "constants"))
    if max(widths) > 1:
        hidden = hidden[to_device(np.repeat(np.arange(len(widths)), widths), hidden.device)]
    products = vectors * hidden.to(vectors.dtype)
    usual = vectors.norm(dim=1) * hidden.to(vectors.dtype).norm(dim=1) / hidden.shape[1] ** 0.5
    return products.sum(1) + constants, torch.maximum(products.norm(dim=1), usual)
