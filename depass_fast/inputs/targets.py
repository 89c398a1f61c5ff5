"""Targets as a user gives them, checked before any work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..adapters import Adapter
from ..runtime.brief import brief
from ..runtime.numbers import as_index
from .token_texts import single_token


@dataclass(frozen=True)
class LogProb:
    """The log-probability of a token as a target: an id or a string of one token. None: the model's own next token.

    It is read in the direction w_t - Σ_j p_j w_j, with the model's probabilities p frozen: the gradient of log p_t. The
    shares sum to logit_t - Σ_j p_j logit_j, which is log p_t plus the entropy of p. Where a family caps its logits, the
    cap's ratio is frozen, too. What raises all logits alike has no share: this is the target for ranking neurons and
    heads.
    """

    token: int | str | None = None

    def __repr__(self) -> str:
        return f"LogProb({'' if self.token is None else brief(self.token)})"


@dataclass(frozen=True)
class Contrast:
    """The difference logit(a) - logit(b) of two tokens, ids or strings, as a target: the pair (a, b) by its name.

    It is also log P(a) - log P(b).
    """

    a: int | str
    b: int | str

    def __repr__(self) -> str:
        return f"Contrast({brief(self.a)}, {brief(self.b)})"


class TargetItem(NamedTuple):
    """One target: the logit of ``token``, less that of ``contrast``; its log-probability; or the product with a vector.

    Without token and vector it is of the model's own next token.
    """

    token: int | None = None
    contrast: int | None = None
    vector: Tensor | None = None
    log_prob: bool = False

    @property
    def of_next_token(self) -> bool:
        """True if the token is the model's own next one, which is not known yet."""
        return self.token is None and self.vector is None

    @property
    def kind(self) -> str:
        """The kind as results name it: "logit", "contrast", "log-prob" or "vector"."""
        if self.vector is not None:
            return "vector"
        if self.log_prob:
            return "log-prob"
        return "logit" if self.contrast is None else "contrast"


@dataclass(frozen=True)
class TargetSpec:
    """A target or a list of them, checked and with their tokens looked up, before the forward pass."""

    items: tuple[TargetItem, ...]
    several: bool


def parse_target(
    target: Any, adapter: Adapter, tokenizer: Any | None, contrast: Any = None, width: int | None = None
) -> TargetSpec:
    """Check a target: None, an id, a string, a LogProb, a Contrast or a pair, a vector (D,), or a list of any of these.

    ``contrast``, an id or a string, is subtracted from every target. ``width`` is that of vectors, by default D.

    Raises:
        ValueError: a string of several tokens, an id outside the vocabulary, a vector of the wrong size or with NaN; a
            contrast of a token with itself; a contrast of a pair, of a vector or of a log-probability.
        TypeError: anything else.
    """
    target = _tensor(target)
    listed = isinstance(target, Tensor) and target.ndim == (2 if target.is_floating_point() else 1)
    several = isinstance(target, list) or listed
    items = list(target) if several else [target]
    if not items:
        raise ValueError("target: empty list; give at least one target, or None for the model's own next token.")
    parsed = [_parse_one(item, adapter, tokenizer, width or adapter.hidden_size) for item in items]
    if contrast is not None:
        parsed = _with_contrast(parsed, contrast, adapter, tokenizer)
    return TargetSpec(tuple(parsed), several)


def texts_in(target: Any) -> Iterator[str]:
    """The strings in a target, however it is given."""
    if isinstance(target, str):
        yield target
    elif isinstance(target, LogProb):
        yield from texts_in(target.token)
    elif isinstance(target, Contrast):
        yield from texts_in([target.a, target.b])
    elif isinstance(target, list | tuple):
        for one in target:
            yield from texts_in(one)


def _with_contrast(
    parsed: list[TargetItem], contrast: Any, adapter: Adapter, tokenizer: Any | None
) -> list[TargetItem]:
    """Return targets with the logit of ``contrast`` subtracted from each."""
    if not isinstance(contrast, str) and not hasattr(contrast, "__index__"):
        raise TypeError(f"contrast: expected a token id or a string of one token, got {contrast!r}.")
    other = _token(contrast, adapter, tokenizer, "contrast")
    if any(item.log_prob for item in parsed):
        raise ValueError(
            "contrast: it is subtracted from a token's logit; this target is a log-probability. The difference of two "
            "log-probabilities is that of the logits: give the token itself, or Contrast(a, b)."
        )
    if any(item.contrast is not None or item.vector is not None for item in parsed):
        raise ValueError("contrast: it is subtracted from a token's logit; this target is a pair or a vector.")
    if any(item.token == other for item in parsed):
        raise ValueError(f"contrast: it is the target itself, {contrast!r}; all shares would be zero.")
    return [item._replace(contrast=other) for item in parsed]


def _tensor(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    return value.tolist() if value.dtype.kind in "OSTU" else torch.from_numpy(value)


def _parse_one(item: Any, adapter: Adapter, tokenizer: Any | None, width: int) -> TargetItem:
    if item is None:
        return TargetItem()
    if isinstance(item, LogProb):
        of = None if item.token is None else _token(item.token, adapter, tokenizer, inside="LogProb")
        return TargetItem(of, log_prob=True)
    if isinstance(item, Contrast):
        return _contrast(item, adapter, tokenizer)
    item = _tensor(item)
    if isinstance(item, Tensor) and item.is_floating_point():
        if tuple(item.shape) != (width,):
            raise ValueError(f"target: a direction must have shape ({width},), got {tuple(item.shape)}.")
        if not item.isfinite().all():
            raise ValueError("target: the direction holds NaN or inf.")
        return TargetItem(vector=item.detach())
    if isinstance(item, tuple):
        if len(item) != 2:
            raise ValueError(f"target: a contrast is a pair (a, b) for logit(a) - logit(b), got {len(item)} entries.")
        first, second = item
        return TargetItem(_token(first, adapter, tokenizer), _token(second, adapter, tokenizer, "target's contrast"))
    return TargetItem(_token(item, adapter, tokenizer))


def _contrast(item: Contrast, adapter: Adapter, tokenizer: Any | None) -> TargetItem:
    a, b = (_token(one, adapter, tokenizer, inside="Contrast") for one in (item.a, item.b))
    if a == b:
        raise ValueError(f"target: {item!r} is of a token and itself; all shares would be zero.")
    return TargetItem(a, b)


def _token(
    item: Any, adapter: Adapter, tokenizer: Any | None, argument: str = "target", inside: str | None = None
) -> int:
    """Return the id of a token, an id or a string; ``inside`` names the object that it is given in."""
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
        if inside is not None:
            raise TypeError(
                f"{argument}: {inside} takes a token id or a string of one token, got {brief(item)}."
            ) from None
        raise TypeError(
            f"{argument}: expected None, a token id, a string, LogProb(token), Contrast(a, b), a pair, a vector in "
            f"R^{adapter.hidden_size}, or a list of these, got {item!r}."
        ) from None
    size = adapter.vocabulary_size
    if not 0 <= token < size:
        raise ValueError(f"{argument}: id {token} is outside the vocabulary (0 to {size - 1}).")
    return token
