"""The activation behind a recurrence's convolution: what values, and often its queries and keys, pass there."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN


def curve(mixer: Any) -> Callable[[Tensor], Tensor]:
    """Give the activation of a mixer's module, by the name that it holds."""
    return ACT2FN[mixer.activation]


@lru_cache(maxsize=64)  # the same function for the same name
def value_ratio(name: str) -> Callable[[Tensor], Tensor] | None:
    """Give act(c) / c, elementwise, of the activation of this name, its limit at zero; None for the identity.

    Raises:
        ValueError: no ratio can stand for it: it is not zero at zero, has weights of its own, or is not known.
    """
    if name in ("silu", "swish"):
        return torch.sigmoid
    what = f"model: the activation {name!r} of the values of its recurrent layers"
    if name not in ACT2FN:
        raise ValueError(f"{what} is not known to transformers.")
    act = ACT2FN[name]
    if isinstance(act, nn.Module) and any(True for _ in act.parameters()):
        raise ValueError(f"{what} has weights of its own, which is not supported.")
    if act(torch.zeros((), dtype=torch.float64)) != 0:
        raise ValueError(f"{what} does not vanish at zero, so that no ratio stands for it; not supported.")

    def ratio(c: Tensor) -> Tensor:
        c = torch.where(c == 0, torch.finfo(c.dtype).eps, c)
        return act(c) / c

    return None if name == "linear" else ratio
