"""Two projections in a row with nothing between them, as one: experts that work in a latent."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .weights import Linear


@dataclass(frozen=True)
class Chained(Linear):
    """A projection behind ``inner``, or in front of ``outer``: one weight and one bias for both."""

    inner: Linear | None = None
    outer: Linear | None = None

    @property
    def parts(self) -> tuple[Linear, Linear]:
        """The first and the second projection."""
        own = Linear(self.module, self.part, keeps_bias=self.keeps_bias)
        if self.inner is not None:
            return self.inner, own
        assert self.outer is not None
        return own, self.outer

    @cached_property
    def shape(self) -> tuple[int, int]:
        first, second = self.parts
        return second.shape[0], first.shape[1]

    @cached_property
    def weight(self) -> Tensor:
        first, second = (one.weight for one in self.parts)
        wide = torch.promote_types(first.dtype, torch.float32)
        return (second.to(wide) @ first.to(wide)).to(first.dtype)

    @cached_property
    def bias(self) -> Tensor | None:
        first, second = self.parts
        if not self.keeps_bias or first.bias is None:
            return second.bias if self.keeps_bias else None
        wide = torch.promote_types(first.bias.dtype, torch.float32)
        through = second.weight.to(wide) @ first.bias.to(wide)
        return (through if second.bias is None else through + second.bias.to(wide)).to(first.bias.dtype)

    @property
    def has_bias(self) -> bool:
        return self.keeps_bias and any(one.has_bias for one in self.parts)

    @property
    def is_own(self) -> bool:
        return False  # its weight is made when it is read

    def project(self, x: Tensor) -> Tensor:
        """The projection of (N, in) to (N, out), in x's dtype, one after the other as the model does it."""
        first, second = self.parts
        return second.project(first.project(x))
