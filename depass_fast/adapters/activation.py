"""The activation of an MLP: from its gate, and from its up projection if there is one, to what `down` reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Activation:
    """``a = curve(g') · (u' + up_offset)``; in an ungated MLP, ``a = curve(g')``.

    g' is the gate, at most ``gate_limit``. u' is the up projection, clamped to ± ``up_limit``. ``curve`` is elementwise
    and takes any floating dtype.
    """

    curve: Callable[[Tensor], Tensor]
    gate_limit: float | None = None
    up_limit: float | None = None
    up_offset: float = 0.0

    def __call__(self, gate: Tensor, up: Tensor | None = None) -> Tensor:
        """The activation (..., I) of pre-activations ``gate`` and ``up`` (..., I), before a router's weight."""
        curved = self.curve(self.limited_gate(gate))
        if up is None:
            return curved
        up = self.limited_up(up)
        return curved * (up + self.up_offset if self.up_offset else up)

    def limited_gate(self, gate: Tensor) -> Tensor:
        """g' of the gate (..., I)."""
        return gate if self.gate_limit is None else gate.clamp(max=self.gate_limit)

    def limited_up(self, up: Tensor) -> Tensor:
        """u' of the up projection (..., I), without the offset."""
        return up if self.up_limit is None else up.clamp(-self.up_limit, self.up_limit)
