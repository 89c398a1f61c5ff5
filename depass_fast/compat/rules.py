"""The published allocation rules where they are not the method's: overridden gates, shares that can be lost."""

from __future__ import annotations

import torch
from torch import Tensor

from ..allocation import Gates

RULES = ("softmax", "linear", "relu", "max", "taylor")
_SMALL, _EPSILON = 1e-5, 1e-6


class PublishedRule:
    """A rule for :class:`depass_fast.allocation.Allocation` with the published exceptions.

    Component 0's gate is 1.0 at position 0; gates of the last component below 1e-5 are zero; where all gates are zero
    the last component takes all. ``tokens`` adds the published last component, what the tokens lack to the hidden
    state: nothing. ``ignore_special`` keeps component 0 out, at position 0 too but for the first exception.
    """

    def __init__(self, rule: str, tokens: bool = False, ignore_special: bool = False) -> None:
        self.rule, self.tokens, self.ignore_special = rule, tokens, ignore_special
        self.__name__ = rule
        if rule == "softmax" and not tokens:
            self.edit_gates = override

    def __call__(self, gates: Gates, temperature: float) -> Tensor:
        g = gates.values.clone()
        if self.tokens:
            g = torch.cat([g, torch.zeros_like(g[:, :1])], dim=1)
        if self.ignore_special:
            g[:, 0] = 0.0
        override(g, gates.positions, absent=0.0)
        g[:, -1].masked_fill_((g == 0).all(1), 1.0)
        shares = self._shares(g, temperature)
        return shares[:, :-1] if self.tokens else shares

    def _shares(self, g: Tensor, temperature: float) -> Tensor:
        absent = g == 0
        if self.rule == "softmax":
            return torch.softmax(g.masked_fill(absent, -torch.inf) / temperature, dim=1)
        if self.rule == "max":
            best = g.masked_fill(absent, -torch.inf).argmax(1, keepdim=True)
            return torch.zeros_like(g).scatter_(1, best, 1.0)
        if self.rule == "linear":
            # the lowest number stands for the absent; what is shifted by it is all that is left, or overflows
            g = g.masked_fill(absent, torch.finfo(g.dtype).min)
            g = torch.relu(g - g.amin(1, keepdim=True)).masked_fill(absent, 0.0)
        else:
            g = torch.relu(g)
        return g / (g.sum(1, keepdim=True) + _EPSILON)


def override(gates: Tensor, positions: Tensor, factor: float = 1.0, absent: float = -torch.inf) -> bool:
    """Apply the published exceptions to ``factor`` times the gates (n, M, I), in place. True if one is absent now."""
    gates[positions == 0, 0] = factor
    small = gates[:, -1].abs() < _SMALL * factor
    gates[:, -1].masked_fill_(small, absent)
    return bool(small.any())
