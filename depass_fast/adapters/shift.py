"""A token shift: a branch reads a mixture of two positions, by channel (RWKV)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .maps import Norm


@dataclass(frozen=True)
class Shift:
    """The mixture that a branch reads: y[t] = μ ⊙ z[t] + (1 - μ) ⊙ z[t-1], z the ``norm`` of the residual stream.

    ``weight`` is μ (D,). In front of a prompt's first position there is nothing. ``lengths`` are those of packed
    prompts, T positions in all.
    """

    norm: Norm
    weight: Tensor

    def of(self, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """The mixture (T, D) of the residual stream (T, D), constants included, in its dtype."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        z, constant = self.norm.apply(wide, self.norm.scale(wide)), self.constant(lengths, wide)
        y = self.mixed(z, lengths)
        return (y if constant is None else y + constant).to(x)

    def constant(self, lengths: Sequence[int], like: Tensor) -> Tensor | None:
        """The mixture (T, D) of the norm's β, in the dtype and on the device of ``like``; None without β."""
        beta = self.norm.bias
        return None if beta is None else self.mixed(beta.to(like).expand(sum(lengths), -1), lengths)

    def mixed(self, z: Tensor, lengths: Sequence[int]) -> Tensor:
        """The mixture of normed states (T, D)."""
        mu = self.weight.to(z)
        parts = [torch.cat([torch.zeros_like(part[:1]), part[:-1]]) for part in z.split(list(lengths))]
        return z * mu + torch.cat(parts) * (1 - mu)

    def back(self, gradients: Tensor, x: Tensor, lengths: Sequence[int]) -> Tensor:
        """Take gradients (R, T, D) of what is read back to the residual stream, which is ``x`` (T, D)."""
        mu = self.weight.to(gradients)
        parts = [torch.cat([one[:, 1:], torch.zeros_like(one[:, :1])], 1) for one in gradients.split(list(lengths), 1)]
        y = gradients * mu + torch.cat(parts, 1) * (1 - mu)
        return self.norm.transposed(y, self.norm.scale(x.to(gradients)))
