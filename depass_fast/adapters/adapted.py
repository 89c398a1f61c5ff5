"""A projection and an adapter beside it, which is part of the model: two narrow projections whose output is added."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from .maps import Linear
from .stored import stored_weight


@dataclass(frozen=True)
class Adapted(Linear):
    """A projection whose outputs are those of its module and of ``adapter`` (r, in), then (out, r): one weight."""

    adapter: nn.Sequential | None = None

    @cached_property
    def weight(self) -> Tensor:
        assert self.adapter is not None
        own, (down, up) = stored_weight(self.module), map(stored_weight, self.adapter)
        if self.part is not None:  # of the outputs, which are the first axis of both
            own, up = self.part(own), self.part(up)
        wide = torch.promote_types(own.dtype, torch.float32)
        return torch.addmm(own.to(wide), up.to(wide), down.to(wide)).to(own.dtype)

    @property
    def is_own(self) -> bool:
        return False  # its weight is made when it is read


def adapted(linear: Linear, adapter: nn.Sequential | None) -> Linear:
    """A projection with the adapter beside it; None: there is none."""
    if adapter is None:
        return linear
    return Adapted(linear.module, linear.part, linear.outer_bias, linear.keeps_bias, adapter=adapter)
