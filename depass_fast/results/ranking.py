"""The order of scores in ``top``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    pass


_KEYS: dict[str, Callable[[Tensor], Tensor]] = {"magnitude": torch.abs, "positive": lambda s: s, "negative": torch.neg}


def check_top(k: int, by: str) -> None:
    """Raises ValueError for an unknown order or fewer than one."""
    if by not in _KEYS:
        raise ValueError(f"by: {by!r} is not one of {', '.join(map(repr, _KEYS))}.")
    if k < 1:
        raise ValueError(f"k: {k} is out of range; it must be at least 1.")


def ranking(scores: Tensor, by: str) -> Tensor:
    """Indices of scores (M,), the leading one first."""
    return _KEYS[by](scores).argsort(descending=True, stable=True)
