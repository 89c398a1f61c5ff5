"""The activation of an MLP: from its gate, and from its up projection if there is one, to what `down` reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """``a = curve(g') · (u' + up_offset)``; in an ungated MLP, ``a = curve(g')``.

    g' is the gate, at most ``gate_limit``. u' is the up projection, clamped to ± ``up_limit``. ``curve`` is elementwise
    and takes any floating dtype. With ``sparsity`` p, g' is what of the gate exceeds a threshold: the p-quantile of a
    normal distribution with the mean and the deviation of all gates at that position (Gemma 3n).
    """

    curve: Callable[[Tensor], Tensor]
    gate_limit: float | None = None
    up_limit: float | None = None
    up_offset: float = 0.0
    sparsity: float = 0.0

    def __call__(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        """The activation (..., I) of pre-activations ``gate`` and ``up`` (..., I), before a router's weight."""
        curved = self.curve(self.limited_gate(gate))
        if up is None:
            return curved
        up = self.limited_up(up)
        return curved * (up + self.up_offset if self.up_offset else up)

    def limited_gate(self, gate: Tensor) -> Tensor:
        """g' of the gate (..., I)."""
        if self.sparsity:
            return torch.relu(gate - self.threshold(gate))
        return gate if self.gate_limit is None else gate.clamp(max=self.gate_limit)

    def threshold(self, gate: Tensor) -> Tensor:
        """The threshold (..., 1) that ``sparsity`` gives for all gates (..., I) of a position."""
        normal = torch.distributions.Normal(0.0, 1.0)
        quantile = float(normal.icdf(torch.tensor(self.sparsity, dtype=torch.float32)))  # as the model has it
        return gate.mean(-1, keepdim=True) + quantile * gate.std(-1, keepdim=True, unbiased=False)

    def limited_up(self, up: Tensor) -> Tensor:
        """u' of the up projection (..., I), without the offset."""
        return up if self.up_limit is None else up.clamp(-self.up_limit, self.up_limit)
