"""Targets: what is read out of the final hidden state. Only the requested directions are ever multiplied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .adapters import Adapter, Norm
from .backends import Backend
from .prompts import as_index, single_token, token_texts
from .state import BIAS, ComponentState


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


@dataclass(frozen=True)
class TargetSpec:
    """A target, checked and with its tokens looked up, before the forward pass; ``items`` are (id, contrast, vector).

    An id of None without a vector is the model's own next token.
    """

    items: tuple[tuple[int | None, int | None, Tensor | None], ...]
    several: bool

    def needs_logits(self) -> bool:
        return any(token is None and vector is None for token, _, vector in self.items)


def parse_target(target: Any, adapter: Adapter, tokenizer: Any | None) -> TargetSpec:
    """Check a target: None, an id, a string, a pair (a, b) for a - b, a vector (D,), or a list of any of these.

    Raises:
        ValueError: a string of several tokens, an id outside the vocabulary, a vector of the wrong size or with NaN.
        TypeError: anything else.
    """
    target = _tensor(target)
    listed = isinstance(target, Tensor) and target.ndim == (2 if target.is_floating_point() else 1)
    several = isinstance(target, list) or listed
    items = list(target) if several else [target]
    if not items:
        raise ValueError("target: empty list; give at least one target, or None for the model's own next token.")
    return TargetSpec(tuple(_parse_one(item, adapter, tokenizer) for item in items), several)


def _tensor(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def _parse_one(item: Any, adapter: Adapter, tokenizer: Any | None) -> tuple[int | None, int | None, Tensor | None]:
    if item is None:
        return None, None, None
    item = _tensor(item)
    if isinstance(item, Tensor) and item.is_floating_point():
        if tuple(item.shape) != (adapter.hidden_size,):
            raise ValueError(f"target: a direction must have shape ({adapter.hidden_size},), got {tuple(item.shape)}.")
        if not item.isfinite().all():
            raise ValueError("target: the direction holds NaN or inf.")
        return None, None, item.detach()
    if isinstance(item, tuple):
        if len(item) != 2:
            raise ValueError(f"target: a contrast is a pair (a, b) for logit(a) - logit(b), got {len(item)} entries.")
        first, second = item
        return _token(first, adapter, tokenizer), _token(second, adapter, tokenizer, "target's contrast"), None
    return _token(item, adapter, tokenizer), None, None


def _token(item: Any, adapter: Adapter, tokenizer: Any | None, argument: str = "target") -> int:
    if isinstance(item, str):
        return single_token(item, tokenizer, argument)
    try:
        token = as_index(item, argument)
    except TypeError:
        raise TypeError(
            f"{argument}: expected None, a token id, a string, a pair, a vector in R^{adapter.hidden_size}, or a list "
            f"of these, got {item!r}."
        ) from None
    size = adapter.vocabulary_size
    if not 0 <= token < size:
        raise ValueError(f"{argument}: id {token} is outside the vocabulary (0 to {size - 1}).")
    return token


def resolve_target(
    spec: TargetSpec, adapter: Adapter, tokenizer: Any | None, final: Tensor | None, dtype: torch.dtype
) -> Directions:
    """The directions of a target; ``final`` (D,) is the normed hidden state that the model's next token is read from.

    Raises:
        ValueError: an unembedding row holds NaN or inf.
    """
    return resolve_targets([spec], adapter, tokenizer, [final], dtype)[0]


def resolve_targets(
    specs: Sequence[TargetSpec],
    adapter: Adapter,
    tokenizer: Any | None,
    finals: Sequence[Tensor | None],
    dtype: torch.dtype,
) -> list[Directions]:
    """:func:`resolve_target` of several; a GPU is waited for twice, whatever their number."""
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
    spec: TargetSpec, adapter: Adapter, tokenizer: Any | None, final: Tensor | None, dtype: torch.dtype, own: int | None
) -> Directions:
    """The directions of a target, ``own`` being the model's next token."""
    device = adapter.unembedding_device
    vectors, constants, names, ids, contrasts = [], [], [], [], []
    for token, contrast, vector in spec.items:
        constant = torch.zeros((), dtype=dtype, device=device)
        if vector is None:
            token = own if token is None else token
            vector, constant = adapter.token_direction(token, final, dtype)
            if contrast is not None:
                other = adapter.token_direction(contrast, final, dtype)
                vector, constant = vector - other[0], constant - other[1]
        vectors.append(vector.to(device, dtype))
        constants.append(constant)
        names.append(_name(token, contrast, tokenizer))
        ids.append(token)
        contrasts.append(contrast)
    if names.count("direction") > 1:
        names = [f"direction {i}" if name == "direction" else name for i, name in enumerate(names)]
    return Directions(
        torch.stack(vectors), torch.stack(constants), tuple(names), tuple(ids), tuple(contrasts), spec.several
    )


def read_scores(
    state: ComponentState, backend: Backend, norm: Norm | None, resid: Tensor, directions: Sequence[Directions]
) -> list[Tensor]:
    """Scores (K, M) of every prompt in the order of its labels, from a state with one position per prompt.

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
