"""The readout of states at the last layer: targets are resolved once per trace, all states are copied at once.

Every copy to the host waits for all that a GPU has to do. So the targets are looked at before the layer loop, when it
has nothing to do, and the scores when everything is on its way: how often it is waited for does not depend on how many
prompts or layers there are.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..adapters import Norm
from ..adapters.streams import StreamEnd
from ..components.model import Tokens
from ..propagation.streams import collapsed
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
from .own import Places
from .targets import Directions, bias_scores, read_scores, resolve_targets, scores_of
from .whole import scores_of_all


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
    end: StreamEnd | None = None  # of several streams: the way to what the norm reads

    @staticmethod
    @full_precision()
    def of(request: Request, directions: Sequence[Directions] | None = None) -> Readout:
        """Resolve the targets of a traced request at everything that it reads, unless ``directions`` are given.

        Raises:
            ValueError: an unembedding row holds NaN or inf.
        """
        adapter, final_norm, places = request.adapter, request.end_given is None, request.places
        device, norm = adapter.unembedding_device, adapter.final_norm() if final_norm else None
        dtype = wide_dtype(request)
        trace = request.require_trace()
        resid = (trace.before_norm if final_norm else trace.resid(request.end)).to(device)
        end = adapter.stream_end(trace.end_read) if final_norm else None
        hidden = read_hidden(request)
        directions = read_directions(request) if directions is None else directions
        norm = None if norm is None else norm.to(device)
        logits, sizes, constants = to_host([*_logits(directions, hidden), bias_scores(directions, norm)])
        widths = [len(one.vectors) for one in directions]
        return Readout(
            places=places,
            directions=tuple(directions),
            logits=logits.split(widths),
            bias_scores=constants.split(widths),
            sizes=sizes.split(widths),
            norm=norm,
            resid=resid,
            dtype=dtype,
            end=None if end is None else end.to(device),
        )

    @property
    def names(self) -> list[tuple[str, ...]]:
        """The names of what is read at every place; of a model's own next token, which one it is."""
        return [one.names for one in self.directions]

    def only(self, chosen: Sequence[int]) -> Readout:
        """Return the readout of some of the places."""
        names = ("places", "directions", "logits", "bias_scores", "sizes")
        return replace(self, **{name: tuple(getattr(self, name)[i] for i in chosen) for name in names})

    def rounds(self) -> list[Readout]:
        """Return the readouts of one place of every prompt, until all places had their turn.

        A prompt that has fewer places than another is read at its last one again.
        """
        of_prompt = [list(group) for _, group in groupby(range(len(self.places)), lambda i: self.places[i][0])]
        turns = range(max(map(len, of_prompt)))
        return [self.only([group[min(turn, len(group) - 1)] for group in of_prompt]) for turn in turns]

    @full_precision()
    def collect(
        self, requests: Sequence[Request], state: ComponentState, errors: Sequence[Sequence[Tensor]]
    ) -> Collected:
        """Read a state at the places, which are all that it holds: one decomposition, or joint ones.

        There are a request and ``errors`` for each decomposition: its completeness errors (P,) at the start and after
        every layer. Places are read one of every prompt at a time, so that no more than these are held in ``dtype``.
        """
        run, offsets = requests[0].run, requests[0].require_trace().offsets
        rounds, found = self.rounds(), []
        for one in rounds:
            here = state
            if len(rounds) > 1:
                here = state.at(state.layout.at(offsets, [np.array([position]) for _, position in one.places]))
            here.rows = here.rows.to(self.resid.device, self.dtype)
            here = here if self.end is None else collapsed(here, self.end)
            scores = read_scores(here, run.operations, self.norm, self.resid, one.directions)
            layout = here.layout
            if run.ranks is not None:
                layout, scores = scores_of_all(scores, layout, one.directions, run.ranks)
            found.append(Round(one, layout, scores))
        return Collected(found, requests, errors, run.verified())


@dataclass(frozen=True)
class Round:
    """The scores (n,) of the rows at one place of every prompt, still on the device."""

    readout: Readout
    layout: Layout
    scores: Tensor

    def split(self, scores: Tensor) -> list[Tensor]:
        """Return the same scores in host memory, (K, M) for every prompt of every decomposition."""
        layout, constants = self.layout, self.readout.bias_scores
        n_decompositions = len(layout.components) // len(constants)
        alive = layout.counts[np.argsort(layout.prompt, kind="stable")]
        widths = [len(one) for one in constants] * n_decompositions
        parts = scores.split((alive * widths).tolist())
        return [
            scores_of(part, components, constants[i % len(constants)])
            for i, (part, components) in enumerate(zip(parts, layout.components, strict=True))
        ]


@dataclass(frozen=True)
class Collected:
    """The scores of a state and the completeness errors of its decompositions, still on the device."""

    rounds: Sequence[Round]
    requests: Sequence[Request]
    errors: Sequence[Sequence[Tensor]]
    verification: Verification | None

    def sizes(self) -> list[Tensor]:
        """Return the sizes (K,) of what is summed up at every read of every prompt."""
        return [
            self.rounds[turn].readout.sizes[prompt]
            for prompt, reads in enumerate(self.requests[0].reads)
            for turn in range(len(reads))
        ]


def to_results(collected: Sequence[Collected]) -> list[list[list[Attribution]]]:
    """Return a result per read of every prompt, for every decomposition that was ``collected`` in a call of the user's.

    All are copied at once.
    """
    held = iter(
        to_host(
            [
                x
                for one in collected
                for x in (*(part.scores for part in one.rounds), *(e for many in one.errors for e in many))
            ]
        )
    )
    seconds, results = time.perf_counter() - collected[0].requests[0].began, []
    for one in collected:
        scores = [part.split(next(held)) for part in one.rounds]
        for d, (request, many) in enumerate(zip(one.requests, one.errors, strict=True)):
            errors = torch.stack([next(held) for _ in many])
            results.append(_results(one, request, d, scores, errors, seconds))
    sizes = [size for one in collected for _ in one.requests for size in one.sizes()]
    flat = [result for of_decomposition in results for of_prompt in of_decomposition for result in of_prompt]
    warn_if_results_miss(collected[0].requests[0], list(zip(flat, sizes, strict=True)))
    return results


def how_computed(request: Request, prompt: int) -> dict[str, Any]:
    """Return the fields of an :class:`Attribution` of a prompt that say how it was computed."""
    adapter, run, kind = request.adapter, request.run, request.components
    kept_out = kind.kind == "tokens" and run.allocation.linear_rule is None  # a linear rule keeps nobody out
    return {
        "components": kind.kind,
        "allocation": run.allocation.name,
        "temperature": run.allocation.temperature,
        "exclude_special": sorted(request.excluded[prompt]) if kept_out else [],
        "value_activation": None if run.value_rule is None else "shared",
        "backend": run.backend.name,
        "device": str(adapter.device),
        "dtype": dtype_name(adapter.dtype),
        "state_dtype": dtype_name(run.state_dtype if request.method is None else wide_dtype(request)),
        "compute_dtype": _products(request),
        "site": kind.site,
        "end": request.end_given,
        "sweep": None if request.method is None or run.allocation.linear_rule is not None else asdict(request.method),
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
    decomposition: int,
    scores: Sequence[Sequence[Tensor]],
    errors: Tensor,
    seconds: float,
) -> list[list[Attribution]]:
    """Return a result per read of every prompt, from the scores of the rounds and all prompts' errors (layers, P)."""
    run, n_prompts = request.run, len(request.prompts)
    said = warn_if_off(one.verification, run.backend.name)
    found = []
    for prompt, reads in enumerate(request.reads):
        at, of_prompt = decomposition * n_prompts + prompt, []
        for turn, (position, part) in enumerate(zip(reads, one.rounds, strict=False)):
            labels, values = _with_later_tokens(request, prompt, part.layout.components[at], scores[turn][at])
            of_prompt.append(
                assemble(
                    scores=values,
                    logits=part.readout.logits[prompt],
                    layer_errors=errors[:, prompt].contiguous(),
                    directions=part.readout.directions[prompt],
                    labels=labels,
                    input_ids=request.prompts[prompt].tolist(),
                    tokens=request.tokens[prompt],
                    layer=request.layer,
                    position=position,
                    seconds=seconds,
                    memory_budget=run.workspace(request.adapter.device),
                    verification=one.verification,
                    warnings=None if said is None else list(said),
                    **how_computed(request, prompt),
                )
            )
        found.append(of_prompt)
    return found


def read_hidden(request: Request) -> Tensor:
    """Return the hidden states (P, D) that a traced request reads, normed or at ``end``, where the unembedding is."""
    trace = request.require_trace()
    final = trace.normed_final if request.end_given is None else trace.resid(request.end)
    device = request.adapter.unembedding_device
    return final.to(device)[to_device(_packed(request), device)]


def read_places(request: Request) -> Places:
    """Return the places that a traced request reads."""
    assert request.finals is not None, "the forward pass was not taken yet"
    return Places(request.places, request.prompts, request.finals)


def read_directions(request: Request) -> list[Directions]:
    """Return the directions of the targets of a traced request, one for every place that it reads.

    Raises:
        ValueError: an unembedding row holds NaN or inf, or the model reads its logits otherwise.
    """
    targets, hidden = [request.targets[prompt] for prompt, _ in request.places], read_hidden(request)
    places, dtype = read_places(request), wide_dtype(request)
    return resolve_targets(targets, request.adapter, request.tokenizer, places, hidden, dtype)


def _packed(request: Request) -> np.ndarray:
    """Return the positions (P,) in the trace that a request reads."""
    offsets = request.require_trace().offsets
    return np.array([offsets[prompt] + position for prompt, position in request.places])


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
