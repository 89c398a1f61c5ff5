"""An expert that gives back what it reads, as an MLP whose maps are all the identity (LongCat's zero experts)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from .activation import Activation
from .maps import Made


@dataclass(frozen=True)
class Same(Made):
    """The identity of the width that ``module`` writes, on its device and in its dtype."""

    @cached_property
    def shape(self) -> tuple[int, int]:
        width = len(self._like)
        return width, width

    @cached_property
    def weight(self) -> Tensor:
        return torch.eye(len(self._like), dtype=self._like.dtype, device=self._like.device)

    @property
    def _like(self) -> Tensor:
        found = self.module.weight
        assert isinstance(found, Tensor)
        return found

    def project(self, x: Tensor) -> Tensor:
        return x


UNCHANGED = Activation(nn.Identity())
