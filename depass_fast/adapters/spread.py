"""A short convolution along the positions behind a branch: what the branch writes reaches later positions, too."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Spread:
    """A branch that gives y writes y[n] + Σ_j w[j] ⊙ y[n - j], causally and by channel, within a prompt.

    ``module`` has the convolution as `conv1d`, (D, 1, K) without a bias.
    """

    module: Any

    @staticmethod
    def of(module: nn.Module | None) -> Spread | None:
        """The convolution of a module; None of none."""
        return None if module is None else Spread(module)

    @cached_property
    def taps(self) -> Tensor:
        """(K, D): by what y is multiplied that is j positions before, in float32 or wider. y itself is in the first."""
        weight = self.module.conv1d.weight.detach()
        taps = weight[:, 0].flip(1).T.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        taps[0] += 1.0
        return taps

    def along(self, y: Tensor) -> Tensor:
        """Apply it to what a branch gives at all positions of one prompt: (N, ..., D)."""
        taps = self.taps.to(y)
        out = y * taps[0]
        for back in range(1, min(len(taps), len(y))):
            out[back:] += y[:-back] * taps[back]
        return out

    def back(self, y: Tensor, offsets: np.ndarray) -> Tensor:
        """Apply the transpose to gradients (R, T, D) of packed prompts, which begin at ``offsets`` (P + 1,)."""
        taps = self.taps.to(y)
        out = y * taps[0]
        for first, last in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            for back in range(1, min(len(taps), last - first)):
                out[:, first : last - back] += y[:, first + back : last] * taps[back]
        return out
