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
        if rule == "softmax" and not tokens and not ignore_special:
            self.edit_gates = override

    def __call__(self, gates: Gates, temperature: float) -> Tensor:
        g = gates.values.masked_fill(~gates.eligible, -torch.inf)  # the absent
        if self.tokens:
            g = torch.cat([g, torch.full_like(g[:, :1], -torch.inf)], dim=1)
        if self.ignore_special:
            g[:, 0] = -torch.inf
        override(g, gates.positions)
        g[:, -1].masked_fill_((g == -torch.inf).all(1), 1.0)
        shares = self._shares(g, temperature)
        return shares[:, :-1] if self.tokens else shares

    def _shares(self, g: Tensor, temperature: float) -> Tensor:
        if self.rule == "softmax":
            return torch.softmax(g / temperature, dim=1)
        if self.rule == "max":
            return torch.zeros_like(g).scatter_(1, g.argmax(1, keepdim=True), 1.0)
        if self.rule == "linear":
            # the lowest number stands for the absent; what is shifted by it is all that is left, or overflows
            absent = g == -torch.inf
            g = g.masked_fill(absent, torch.finfo(g.dtype).min)
            g = torch.relu(g - g.amin(1, keepdim=True)).masked_fill(absent, 0.0)
        else:
            g = torch.relu(g)
        return g / (g.sum(1, keepdim=True) + _EPSILON)


def override(gates: Tensor, positions: Tensor, factor: float = 1.0) -> bool:
    """Apply the published exceptions to ``factor`` times the gates (n, M, I), in place. True if one is absent now."""
    gates[positions == 0, 0] = factor
    small = gates[:, -1].abs() < _SMALL * factor
    gates[:, -1].masked_fill_(small, -torch.inf)
    return bool(small.any())
