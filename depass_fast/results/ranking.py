"""Components by the size of their scores, and by their labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_KEYS: dict[str, Callable[[Tensor], Tensor]] = {"magnitude": torch.abs, "positive": lambda s: s, "negative": torch.neg}


def leading(labels: Sequence[str], scores: Tensor, k: int, by: str) -> list[tuple[str, float]]:
    """Return the ``k`` leading of scores (M,) as (label, score).

    Raises:
        ValueError: ``by`` is no known order, or ``k`` is less than one.
        TypeError: ``k`` is no integer.
    """
    if by not in _KEYS:
        raise ValueError(f"by: {by!r} is not one of {', '.join(map(repr, _KEYS))}.")
    if not hasattr(k, "__index__"):
        raise TypeError(f"k: expected an integer, got {k!r}.")
    if k < 1:
        raise ValueError(f"k: {k} is out of range; it must be at least 1.")
    order: list[int] = _KEYS[by](scores).argsort(descending=True, stable=True)[:k].tolist()
    return [(labels[i], float(scores[i])) for i in order]


class NoComponent(KeyError):
    """There is no component of a label. It is shown as a sentence, where a KeyError is shown as a quoted one."""

    def __str__(self) -> str:
        return self.args[0]


def score_of(labels: Sequence[str], scores: Tensor, label: str) -> float:
    """Return the score (of M,) that belongs to a label; raises KeyError where there is none."""
    if label not in labels:
        is_word = isinstance(label, str) and len(label.strip()) > 1
        near = [one for one in labels if label in one][:3] if is_word else []
        there = f"did you mean {' or '.join(map(repr, near))}?" if near else ""
        there = there or f"labels run from {labels[0]!r} to {labels[-1]!r}."
        raise NoComponent(f"no component {label!r}; {there}")
    return float(scores[labels.index(label)])


def target_row(scores: Tensor, target: int) -> Tensor:
    """Return one target's scores (M,) of (M,) or (K, M); raises IndexError where it is out of range."""
    scores = torch.atleast_2d(scores)
    if not -len(scores) <= target < len(scores):
        raise IndexError(f"target: {target} is out of range; this result holds {len(scores)}.")
    return scores[target]
