"""Targets as directions in the space of the final hidden state. Only the requested ones are ever multiplied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..adapters import Adapter, Norm
from ..backends import Backend
from ..inputs.targets import TargetSpec
from ..inputs.token_texts import token_texts
from ..labels import BIAS
from ..runtime.transfer import all_to_device, to_device
from ..state.layout import Components
from ..state.state import ComponentState
from .own import OwnLogits, Places, refusal, rounding, sums_of_products


@dataclass(frozen=True)
class Directions:
    """K directions in the space of the hidden state: ``vectors`` (K, D), their ``constants`` (K,) and names.

    ``ids`` holds a token id per direction (None for a free vector), ``contrast_ids`` the token subtracted from it.
    ``several`` says whether the user asked for a list, so that scores keep the axis.
    """

    vectors: Tensor
    constants: Tensor
    names: tuple[str, ...]
    ids: tuple[int | None, ...]
    contrast_ids: tuple[int | None, ...]
    several: bool


def resolve_target(
    spec: TargetSpec, adapter: Adapter, tokenizer: Any | None, places: Places, final: Tensor, dtype: torch.dtype
) -> Directions:
    """Return the directions of a target; ``final`` (D,) is the normed hidden state that the model's logits come from.

    ``places`` is that one place.

    Raises:
        ValueError: an unembedding row holds NaN or inf, or the model's logit is not the product with it.
    """
    return resolve_targets([spec], adapter, tokenizer, places, final[None], dtype)[0]


def resolve_targets(
    specs: Sequence[TargetSpec],
    adapter: Adapter,
    tokenizer: Any | None,
    places: Places,
    finals: Tensor,
    dtype: torch.dtype,
) -> list[Directions]:
    """Resolve targets at P ``places``, whose normed states are ``finals`` (P, D), as :func:`resolve_target` does one.

    Neither the number of operations nor that of waits for a GPU depends on how many there are.
    """
    own = _own_logits(specs, adapter, places, finals)
    items = [
        _Item(place, own.next_tokens[place] if token is None and vector is None else token, contrast, vector)
        for place, spec in enumerate(specs)
        for token, contrast, vector in spec.items
    ]
    vectors, constants = _directions(items, adapter, tokenizer, finals, dtype, own)
    ends = np.cumsum([len(spec.items) for spec in specs])
    return [
        Directions(
            vectors=vectors[end - len(spec.items) : end],
            constants=constants[end - len(spec.items) : end],
            names=_names(items[end - len(spec.items) : end], tokenizer),
            ids=tuple(item.token for item in items[end - len(spec.items) : end]),
            contrast_ids=tuple(item.contrast for item in items[end - len(spec.items) : end]),
            several=spec.several,
        )
        for spec, end in zip(specs, ends.tolist(), strict=True)
    ]


class _Item(NamedTuple):
    """One direction at the hidden state ``place``: of a ``token``, less that of its ``contrast``, or a ``vector``."""

    place: int
    token: int | None
    contrast: int | None
    vector: Tensor | None


def _own_logits(specs: Sequence[TargetSpec], adapter: Adapter, places: Places, finals: Tensor) -> OwnLogits:
    """Return the model's logits of all tokens and contrasts that are given, and of its next token where one asks."""
    asked = [place for place, spec in enumerate(specs) if spec.needs_logits()]
    given = [
        (place, token)
        for place, spec in enumerate(specs)
        for of_item in spec.items
        for token in of_item[:2]
        if token is not None
    ]
    return OwnLogits.at(adapter, places, finals, given, asked)


def _directions(
    items: Sequence[_Item],
    adapter: Adapter,
    tokenizer: Any | None,
    finals: Tensor,
    dtype: torch.dtype,
    own: OwnLogits,
) -> tuple[Tensor, Tensor]:
    """Return the directions (K, D) of all items and their constants (K,).

    Raises:
        ValueError: an unembedding row holds NaN or inf, or the model's logit is not the product with it.
    """
    device = adapter.unembedding_device
    looked_up = [i for i, item in enumerate(items) if item.token is not None]
    free = [i for i, item in enumerate(items) if item.token is None]
    vectors, constants = _token_directions([items[i] for i in looked_up], adapter, tokenizer, finals, dtype, own)
    if not free:
        return vectors, constants
    given = torch.stack([item.vector.to(device, dtype) for item in items if item.vector is not None])
    if not looked_up:
        return given, given.new_zeros(len(given))
    order = to_device(np.argsort(looked_up + free), device)
    return torch.cat([vectors, given])[order], torch.cat([constants, constants.new_zeros(len(free))])[order]


def _token_directions(
    items: Sequence[_Item],
    adapter: Adapter,
    tokenizer: Any | None,
    finals: Tensor,
    dtype: torch.dtype,
    own: OwnLogits,
) -> tuple[Tensor, Tensor]:
    """Return the directions (K, D) and constants (K,) of items that are tokens, less those of their contrasts."""
    device = adapter.unembedding_device
    if not items:
        return torch.empty(0, finals.shape[1], dtype=dtype, device=device), torch.empty(0, dtype=dtype, device=device)
    against = [i for i, item in enumerate(items) if item.contrast is not None]
    tokens = [item.token for item in items if item.token is not None]  # all have one
    tokens += [item.contrast for item in items if item.contrast is not None]
    places = [item.place for item in items] + [items[i].place for i in against]
    chosen, at = all_to_device([np.array(tokens, np.int64), np.array(places)], device)
    hidden = finals if places == list(range(len(finals))) else finals.to(device)[at]
    vectors, constants = adapter.token_directions(chosen, hidden, dtype)
    _check(adapter, tokenizer, list(zip(places, tokens, strict=True)), vectors, constants, hidden, own)
    n = len(items)
    if against:
        others, other_constants = vectors[n:], constants[n:]
        vectors, constants, less = vectors[:n], constants[:n], to_device(np.array(against), device)
        vectors.index_add_(0, less, others, alpha=-1)
        constants.index_add_(0, less, other_constants, alpha=-1)
    return vectors, constants


def _check(
    adapter: Adapter,
    tokenizer: Any | None,
    asked: Sequence[tuple[int, int]],
    vectors: Tensor,
    constants: Tensor,
    hidden: Tensor,
    own: OwnLogits,
) -> None:
    """Compare the logits that are shared out with the model's own. Everything is copied to the host at once.

    ``asked`` (K) are pairs of a place and a token, those of ``vectors`` (K, D).

    Raises:
        ValueError: a row holds NaN or inf, or the model's logit is another one.
    """
    theirs, sums = own.of(asked), sums_of_products(vectors, hidden)
    logits = torch.stack([sums[:, 0] + constants, theirs.to(sums)], 1)
    for (_, token), (ours, wanted, *sizes) in zip(asked, torch.cat([logits, sums], 1).tolist(), strict=True):
        if not math.isfinite(sizes[-1]):
            raise ValueError(f"target: the unembedding of token {token} holds NaN or inf.")
        if not abs(ours - wanted) <= rounding(adapter, hidden.dtype, theirs.dtype, sizes, wanted):
            raise ValueError(refusal(adapter, _name(token, None, tokenizer), wanted, ours))


def _names(items: Sequence[_Item], tokenizer: Any | None) -> tuple[str, ...]:
    names = [_name(item.token, item.contrast, tokenizer) for item in items]
    if names.count("direction") > 1:
        names = [f"direction {i}" if name == "direction" else name for i, name in enumerate(names)]
    return tuple(names)


def read_scores(
    state: ComponentState, backend: Backend, norm: Norm | None, resid: Tensor, directions: Sequence[Directions]
) -> Tensor:
    """Return the scores of every component that is alive in its prompt's directions, one prompt after the other: (n,).

    A prompt's are (alive, K), in row order, flattened; ``state`` has one position per prompt. ``resid`` (T, D) is the
    hidden state under the frozen final ``norm``; without a norm the state itself is read. :func:`scores_of` makes
    scores of them.
    """
    layout, widths = state.layout, [len(d.vectors) for d in directions]
    vectors = directions[0].vectors if len(directions) == 1 else torch.cat([d.vectors for d in directions])
    raw = backend.read_out(state, norm, resid, vectors).to(state.rows.dtype)  # (R, ΣK)
    if len(directions) == 1 and len(layout.components) == 1:
        return raw.flatten()
    firsts, picked = np.cumsum([0, *widths]).tolist(), []
    order = np.argsort(layout.prompt, kind="stable")  # those of a joint state lie position by position
    for prompt, segment in enumerate(order.tolist()):
        place = prompt % len(directions)
        rows = np.arange(int(layout.starts[segment]), int(layout.starts[segment + 1]))[:, None]
        picked.append((rows * firsts[-1] + np.arange(firsts[place], firsts[place + 1])).flatten())
    return raw.flatten()[to_device(np.concatenate(picked), raw.device)]


def bias_scores(directions: Sequence[Directions], norm: Norm | None) -> Tensor:
    """Return what the readout's constants add to the score of `bias`: (ΣK,)."""
    constants = torch.cat([d.constants for d in directions])
    if norm is None or norm.bias is None:
        return constants
    vectors = torch.cat([d.vectors for d in directions])
    return constants + vectors @ norm.bias.to(vectors)


def scores_of(alive: Tensor, components: Components, constants: Tensor) -> Tensor:
    """Return scores (K, M) in the order of the labels, from the (n,) of :func:`read_scores` of one prompt.

    ``constants`` (K,) are added to `bias`. All are in host memory.
    """
    alive = alive.view(-1, len(constants))
    full = alive.new_zeros(len(components), len(constants))
    full[: len(alive)] = alive
    bias = components.index(BIAS)
    if bias is not None:
        full[bias] += constants
    return torch.roll(full, -len(components.extras), dims=0).T.contiguous()


def _name(token: int | None, contrast: int | None, tokenizer: Any | None) -> str:
    if token is None:
        return "direction"
    texts = token_texts([token] if contrast is None else [token, contrast], tokenizer)
    return " - ".join(repr(text) if tokenizer is not None else f"id {text}" for text in texts)
