"""Weights as numbers, however a module stores them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True, eq=False)
class Stacked:
    """One expert's matrix within a tensor of all of them, (E, out, in), as if it were a linear module."""

    stack: Tensor
    index: int

    @property
    def weight(self) -> Tensor:
        return self.stack[self.index]


def stored_weight(module: nn.Module | Stacked) -> Tensor:
    """The weight of a linear module, (out, in): a view of the model's own wherever that is plain."""
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def stored_bias(module: nn.Module | Stacked) -> Tensor | None:
    """The bias (out,) of a module, or None."""
    return getattr(module, "bias", None)
