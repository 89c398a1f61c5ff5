"""Targets as a user gives them, checked before any work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..adapters import Adapter
from .prompts import as_index
from .token_texts import single_token


@dataclass(frozen=True)
class TargetSpec:
    """A target, checked and with its tokens looked up, before the forward pass; ``items`` are (id, contrast, vector).

    An id of None without a vector is the model's own next token.
    """

    items: tuple[tuple[int | None, int | None, Tensor | None], ...]
    several: bool

    def needs_logits(self) -> bool:
        return any(token is None and vector is None for token, _, vector in self.items)


def parse_target(target: Any, adapter: Adapter, tokenizer: Any | None, contrast: Any = None) -> TargetSpec:
    """Check a target: None, an id, a string, a pair (a, b) for a - b, a vector (D,), or a list of any of these.

    ``contrast``, an id or a string, is subtracted from every target.

    Raises:
        ValueError: a string of several tokens, an id outside the vocabulary, a vector of the wrong size or with NaN; a
            contrast of a pair or of a vector.
        TypeError: anything else.
    """
    target = _tensor(target)
    listed = isinstance(target, Tensor) and target.ndim == (2 if target.is_floating_point() else 1)
    several = isinstance(target, list) or listed
    items = list(target) if several else [target]
    if not items:
        raise ValueError("target: empty list; give at least one target, or None for the model's own next token.")
    parsed = [_parse_one(item, adapter, tokenizer) for item in items]
    if contrast is not None:
        if not isinstance(contrast, str) and not hasattr(contrast, "__index__"):
            raise TypeError(f"contrast: expected a token id or a string of one token, got {contrast!r}.")
        other = _token(contrast, adapter, tokenizer, "contrast")
        if any(against is not None or vector is not None for _, against, vector in parsed):
            raise ValueError("contrast: it is subtracted from a token's logit; this target is a pair or a vector.")
        if any(token == other for token, _, _ in parsed):
            raise ValueError(f"contrast: it is the target itself, {contrast!r}; all shares would be zero.")
        parsed = [(token, other, None) for token, _, _ in parsed]
    return TargetSpec(tuple(parsed), several)


def _tensor(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    return value.tolist() if value.dtype.kind in "OSTU" else torch.from_numpy(value)


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
        token, size = single_token(item, tokenizer, argument), adapter.vocabulary_size
        if token >= size:
            raise ValueError(
                f"{argument}: {item!r} is the tokenizer's id {token}, outside the model's vocabulary "
                f"(0 to {size - 1}); the tokenizer has more tokens than the model."
            )
        return token
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
