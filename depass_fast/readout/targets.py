"""Targets as directions in the space of the final hidden state. Only the requested ones are ever multiplied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapters import Adapter, Norm
from ..backends import Backend
from ..inputs.prompts import token_texts
from ..inputs.targets import TargetSpec
from ..labels import BIAS
from ..state.state import ComponentState


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
    spec: TargetSpec, adapter: Adapter, tokenizer: Any | None, final: Tensor, dtype: torch.dtype
) -> Directions:
    """Return the directions of a target; ``final`` (D,) is the normed hidden state that the model's logits come from.

    Raises:
        ValueError: an unembedding row holds NaN or inf.
    """
    return resolve_targets([spec], adapter, tokenizer, [final], dtype)[0]


def resolve_targets(
    specs: Sequence[TargetSpec],
    adapter: Adapter,
    tokenizer: Any | None,
    finals: Sequence[Tensor],
    dtype: torch.dtype,
) -> list[Directions]:
    """Resolve several targets as :func:`resolve_target` does one; a GPU is waited for twice, whatever their number."""
    argmax = [adapter.logits(final).argmax() for spec, final in zip(specs, finals, strict=True) if spec.needs_logits()]
    own = iter(torch.stack(argmax).tolist() if argmax else [])
    found = [
        _resolve(spec, adapter, tokenizer, final, dtype, next(own) if spec.needs_logits() else None)
        for spec, final in zip(specs, finals, strict=True)
    ]
    finite = torch.cat([one.vectors for one in found]).isfinite().all(1).tolist()
    for token, is_finite in zip((token for one in found for token in one.ids), finite, strict=True):
        if token is not None and not is_finite:
            raise ValueError(f"target: the unembedding of token {token} holds NaN or inf.")
    return found


def _resolve(
    spec: TargetSpec, adapter: Adapter, tokenizer: Any | None, final: Tensor, dtype: torch.dtype, own: int | None
) -> Directions:
    """Return the directions of a target; ``own`` is the model's next token, None where nobody asks for it."""
    vectors, constants, names, ids, contrasts = [], [], [], [], []
    for item in spec.items:
        token_asked_for, contrast, free = item
        token = own if token_asked_for is None and free is None else token_asked_for
        if token is None:
            assert free is not None, "an item is a token or a vector"
            vector, constant = free, torch.zeros((), dtype=dtype, device=adapter.unembedding_device)
        else:
            vector, constant = _token_direction(token, contrast, adapter, final, dtype)
        vectors.append(vector.to(adapter.unembedding_device, dtype))
        constants.append(constant)
        names.append(_name(token, contrast, tokenizer))
        ids.append(token)
        contrasts.append(contrast)
    if names.count("direction") > 1:
        names = [f"direction {i}" if name == "direction" else name for i, name in enumerate(names)]
    return Directions(
        torch.stack(vectors), torch.stack(constants), tuple(names), tuple(ids), tuple(contrasts), spec.several
    )


def _token_direction(
    token: int, contrast: int | None, adapter: Adapter, final: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the direction (D,) and the constant () of a token's logit, less those of its contrast."""
    vector, constant = adapter.token_direction(token, final, dtype)
    if contrast is None:
        return vector, constant
    other, other_constant = adapter.token_direction(contrast, final, dtype)
    return vector - other, constant - other_constant


def read_scores(
    state: ComponentState, backend: Backend, norm: Norm | None, resid: Tensor, directions: Sequence[Directions]
) -> list[Tensor]:
    """Return scores (K, M) of every prompt in the order of its labels, from a state with one position per prompt.

    ``resid`` (T, D) is the hidden state under the frozen final ``norm``; without a norm the state itself is read.
    """
    layout, scores = state.layout, []
    raw = backend.read_out(state, norm, resid, torch.cat([d.vectors for d in directions]))  # (R, ΣK)
    first = 0
    for prompt, (components, wanted) in enumerate(zip(layout.components, directions, strict=True)):
        k = len(wanted.vectors)
        rows = raw[layout.rows(prompt), first : first + k].to(state.rows.dtype)  # (alive, K)
        full = rows.new_zeros(len(components), k)
        full[: len(rows)] = rows
        bias = components.index(BIAS)
        if bias is not None:
            full[bias] += wanted.constants
            if norm is not None and norm.bias is not None:
                full[bias] += wanted.vectors @ norm.bias.to(wanted.vectors)
        scores.append(torch.roll(full, -len(components.extras), dims=0).T.contiguous())
        first += k
    return scores


def _name(token: int | None, contrast: int | None, tokenizer: Any | None) -> str:
    if token is None:
        return "direction"
    texts = token_texts(torch.tensor([token] if contrast is None else [token, contrast], device="cpu"), tokenizer)
    return " - ".join(repr(text) if tokenizer is not None else f"id {text}" for text in texts)
