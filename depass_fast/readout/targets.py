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
from ..inputs.targets import TargetItem, TargetSpec
from ..inputs.token_texts import token_texts
from ..labels import BIAS
from ..runtime.precision import full_precision
from ..runtime.transfer import all_to_device, to_device
from ..state.layout import Components
from ..state.state import ComponentState
from .log_probs import MeanToken
from .own import OwnLogits, Places, check_log_z, refusal, rounding, sums_of_products


@dataclass(frozen=True)
class Directions:
    """K directions in the space of the hidden state: ``vectors`` (K, D), their ``constants`` (K,) and names.

    ``ids`` holds a token id per direction (None for a free vector), ``contrast_ids`` the token subtracted from it,
    ``kinds`` the kind of target. ``several`` says whether the user asked for a list, so that scores keep the axis.
    ``log_z`` () is log Z of the model's logits where one of the targets is a log-probability.
    """

    vectors: Tensor
    constants: Tensor
    names: tuple[str, ...]
    ids: tuple[int | None, ...]
    contrast_ids: tuple[int | None, ...]
    kinds: tuple[str, ...]
    several: bool
    log_z: Tensor | None = None


@full_precision()
def resolve_targets(
    specs: Sequence[TargetSpec],
    adapter: Adapter,
    tokenizer: Any | None,
    places: Places,
    finals: Tensor,
    dtype: torch.dtype,
) -> list[Directions]:
    """Return the directions of targets at P ``places``, whose normed final hidden states are ``finals`` (P, D).

    Neither the number of operations nor that of waits for a GPU depends on how many there are. Log-probabilities take
    one pass over the vocabulary, for all of them.

    Raises:
        ValueError: an unembedding row holds NaN or inf, or the model's logits are not the products with its rows.
    """
    own = _own_logits(specs, adapter, places, finals, dtype)
    items = [
        _Item(place, item._replace(token=own.next_tokens[place]) if item.of_next_token else item)
        for place, spec in enumerate(specs)
        for item in spec.items
    ]
    vectors, constants, log_z = _directions(items, adapter, tokenizer, finals, dtype, own)
    ends, slots = np.cumsum([len(spec.items) for spec in specs]).tolist(), {p: i for i, p in enumerate(own.summed)}
    found = []
    for place, (spec, end) in enumerate(zip(specs, ends, strict=True)):
        here = slice(end - len(spec.items), end)
        targets = [item.target for item in items[here]]
        found.append(
            Directions(
                vectors=vectors[here],
                constants=constants[here],
                names=_names(targets, tokenizer),
                ids=tuple(target.token for target in targets),
                contrast_ids=tuple(target.contrast for target in targets),
                kinds=tuple(target.kind for target in targets),
                several=spec.several,
                log_z=log_z[slots[place]] if place in slots else None,
            )
        )
    return found


class _Item(NamedTuple):
    """A ``target`` at the hidden state ``place``. The model's own next token is known."""

    place: int
    target: TargetItem


def _own_logits(
    specs: Sequence[TargetSpec], adapter: Adapter, places: Places, finals: Tensor, dtype: torch.dtype
) -> OwnLogits:
    """Return the model's logits of all tokens and contrasts that are given, and what else of its logits is asked for.

    That is its next token, and log Z for log-probabilities.
    """
    asked = [place for place, spec in enumerate(specs) if any(item.of_next_token for item in spec.items)]
    given = [
        (place, token)
        for place, spec in enumerate(specs)
        for item in spec.items
        for token in (item.token, item.contrast)
        if token is not None
    ]
    summed = [place for place, spec in enumerate(specs) if any(item.log_prob for item in spec.items)]
    return OwnLogits.at(adapter, places, finals, given, asked, summed, dtype)


def _directions(
    items: Sequence[_Item],
    adapter: Adapter,
    tokenizer: Any | None,
    finals: Tensor,
    dtype: torch.dtype,
    own: OwnLogits,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the directions (K, D) of all items, their constants (K,), and log Z (S,) at the places ``own.summed``."""
    device = adapter.unembedding_device
    looked_up = [i for i, item in enumerate(items) if item.target.token is not None]
    free = [i for i, item in enumerate(items) if item.target.token is None]
    vectors, constants, log_z = _token_directions([items[i] for i in looked_up], adapter, tokenizer, finals, dtype, own)
    if not free:
        return vectors, constants, log_z
    given = torch.stack([item.target.vector.to(device, dtype) for item in items if item.target.vector is not None])
    if not looked_up:
        return given, given.new_zeros(len(given)), log_z
    order = to_device(np.argsort(looked_up + free), device)
    return torch.cat([vectors, given])[order], torch.cat([constants, constants.new_zeros(len(free))])[order], log_z


def _token_directions(
    items: Sequence[_Item],
    adapter: Adapter,
    tokenizer: Any | None,
    finals: Tensor,
    dtype: torch.dtype,
    own: OwnLogits,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the directions (K, D) and constants (K,) of items that are tokens, and log Z (S,) of :func:`_directions`.

    From each the direction of its contrast is subtracted, or the mean of all tokens where it is a log-probability.
    """
    device = adapter.unembedding_device
    if not items:
        vectors = torch.empty(0, finals.shape[1], dtype=dtype, device=device)
        return vectors, vectors.new_empty(0), vectors.new_empty(0)
    against = [i for i, item in enumerate(items) if item.target.contrast is not None]
    tokens = [item.target.token for item in items if item.target.token is not None]  # all have one
    tokens += [item.target.contrast for item in items if item.target.contrast is not None]
    places = [item.place for item in items] + [items[i].place for i in against]
    chosen, at = all_to_device([np.array(tokens, np.int64), np.array(places)], device)
    hidden = finals if places == list(range(len(finals))) else finals.to(device)[at]
    vectors, constants = adapter.token_directions(chosen, hidden, dtype)
    sums = sums_of_products(vectors, hidden)
    _check(adapter, tokenizer, list(zip(places, tokens, strict=True)), constants, sums, hidden.dtype, own)
    n = len(items)
    others, other_constants = vectors[n:], constants[n:]
    vectors, constants = vectors[:n], constants[:n]
    if against:
        less = to_device(np.array(against), device)
        vectors.index_add_(0, less, others, alpha=-1)
        constants.index_add_(0, less, other_constants, alpha=-1)
    if not own.summed:
        return vectors, constants, constants.new_empty(0)
    return vectors, constants, _less_means(vectors, constants, sums, items, adapter, finals, own)


def _less_means(
    vectors: Tensor,
    constants: Tensor,
    sums: Tensor,
    items: Sequence[_Item],
    adapter: Adapter,
    finals: Tensor,
    own: OwnLogits,
) -> Tensor:
    """Subtract the mean of all tokens from the directions (K, D) and constants (K,) of log-probabilities, in place.

    ``sums`` are those of all tokens' products, the items' first.

    Returns:
        log Z (S,) at the places ``own.summed``.
    """
    chosen = [i for i, item in enumerate(items) if item.target.log_prob]
    tokens = [items[i].target.token or 0 for i in chosen]  # all have one
    slots = np.searchsorted(own.summed, [items[i].place for i in chosen])
    firsts = np.array(chosen)[np.searchsorted(slots, np.arange(len(own.summed)))]  # a log-probability of each place
    arrays = [np.array(chosen), np.array(tokens, np.int64), slots, firsts, np.array(own.summed)]
    rows, of, at, few, read = all_to_device(arrays, vectors.device)
    mean = MeanToken.at(adapter, finals.to(vectors.device)[read].to(vectors.dtype), own.top)
    check_log_z(adapter, own, mean.log_z, mean.is_finite, sums[few], finals.dtype)
    vectors[rows], constants[rows] = mean.subtracted(of, vectors[rows], constants[rows], at)
    return mean.log_z


def _check(
    adapter: Adapter,
    tokenizer: Any | None,
    asked: Sequence[tuple[int, int]],
    constants: Tensor,
    sums: Tensor,
    hidden: torch.dtype,
    own: OwnLogits,
) -> None:
    """Compare the logits that are shared out with the model's own. Everything is copied to the host at once.

    ``asked`` (K) are pairs of a place and a token, ``constants`` (K,) theirs, and ``sums`` (K, 3) those of the products
    of their directions with hidden states, whose dtype is ``hidden``.

    Raises:
        ValueError: a row holds NaN or inf, or the model's logit is another one.
    """
    theirs = own.of(asked)
    logits = torch.stack([sums[:, 0] + constants, theirs.to(sums)], 1)
    for (_, token), (ours, wanted, *sizes) in zip(asked, torch.cat([logits, sums], 1).tolist(), strict=True):
        if not math.isfinite(sizes[-1]):
            raise ValueError(f"target: the unembedding of token {token} holds NaN or inf.")
        if not abs(ours - wanted) <= rounding(adapter, hidden, theirs.dtype, sizes, wanted):
            raise ValueError(refusal(adapter, _name(TargetItem(token), tokenizer), wanted, ours))


def _names(targets: Sequence[TargetItem], tokenizer: Any | None) -> tuple[str, ...]:
    names = [_name(target, tokenizer) for target in targets]
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


def _name(target: TargetItem, tokenizer: Any | None) -> str:
    if target.token is None:
        return "direction"
    tokens = [target.token] if target.contrast is None else [target.token, target.contrast]
    name = " - ".join(repr(text) if tokenizer is not None else f"id {text}" for text in token_texts(tokens, tokenizer))
    return f"log P({name}), P frozen" if target.log_prob else name
