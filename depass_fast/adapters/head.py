"""A head between the final norm and the unembedding, ``norm(act(dense(x)))``, frozen at a hidden state (ModernBERT).

Its activation is frozen at the ratio act(z) / z and its norm at its scale. Then it is an affine map of its own at every
position, and a token's logit is a product with one direction there (DESIGN.md section 2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .maps import Norm
from .stored import stored_bias, stored_weight


@dataclass(frozen=True)
class Head:
    """The modules of such a head."""

    dense: nn.Module
    act: Callable[[Tensor], Tensor]
    norm: Norm

    @property
    def has_bias(self) -> bool:
        return stored_bias(self.dense) is not None or self.norm.bias is not None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Give what the unembedding reads at normed final hidden states (..., D), in their dtype."""
        y = self.norm.normed(self.act(self._dense(hidden)))
        return y if self.norm.bias is None else y + self.norm.bias.to(y)

    def pulled_back(self, vectors: Tensor, constants: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Directions (K, D) and constants (K,) in front of the head for those behind it, at ``hidden`` (K, D)."""
        ratio, scale = self._frozen(hidden.to(vectors))
        if self.norm.bias is not None:
            constants = constants + vectors @ self.norm.bias.to(vectors)
        vectors, bias = self.norm.transposed(vectors, scale) * ratio, stored_bias(self.dense)
        if bias is not None:
            constants = constants + vectors @ bias.to(vectors)
        return vectors @ stored_weight(self.dense).to(vectors), constants

    def pushed(self, parts: Tensor, hidden: Tensor) -> Tensor:
        """Give what components (M, D) of one hidden state (D,) are behind the head, without its constants: (M, D)."""
        ratio, scale = self._frozen(hidden[None].to(parts))
        return self.norm.apply(parts @ stored_weight(self.dense).to(parts).T * ratio, scale.expand(len(parts)))

    def _dense(self, hidden: Tensor) -> Tensor:
        bias = stored_bias(self.dense)
        weight = stored_weight(self.dense).to(hidden)
        return nn.functional.linear(hidden, weight, None if bias is None else bias.to(hidden))

    def _frozen(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The ratio act(z) / z (K, D), and the norm's scale (K,)."""
        z = self._dense(hidden)
        a = self.act(z)
        return torch.where(z == 0, 0.0, a / torch.where(z == 0, 1.0, z)), self.norm.scale(a)
