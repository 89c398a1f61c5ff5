"""The allocation rules in two passes over blocks of components: their statistics, then each component's share.

Components meet only in a few numbers per position and neuron (DESIGN.md section 2, *Independence given the partition
function*): for the softmax the maximum and the sum, which is log Z; for the other rules as little. Once these are known
a component's share depends on itself alone, whatever the blocks. The numbers are those of
:mod:`depass_fast.allocation`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..allocation import inverse, taking_part

_START = {
    "softmax": {"top": -torch.inf, "sum": 0.0},
    "linear": {"low": torch.inf, "sum": 0.0, "count": 0.0},
    "relu": {"sum": 0.0},
    "max": {"top": -torch.inf, "winner": -1.0},
}


@dataclass(frozen=True)
class GateBlock:
    """Gates of a block of components: ``values`` (n, b, I); ``alive`` and ``excluded`` (n, b).

    ``members`` (b,) are the components' places among all of the prompt, ``rest`` and ``bias`` are the places of these
    in the block. ``constant`` (I,) is the part of the gates that `bias` drives without a state.
    """

    values: Tensor
    alive: Tensor
    excluded: Tensor
    members: Tensor
    rest: int | None
    bias: int | None = None
    constant: Tensor | None = None

    @property
    def eligible(self) -> Tensor:
        return taking_part(self.alive, self.excluded, self.bias, self.constant)


@dataclass
class Statistics:
    """Statistics of all components at S positions for I neurons: ``tables`` (S, I); ``alive`` (S,) counts them."""

    rule: str
    temperature: float
    has_rest: bool
    alive: Tensor
    tables: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def fresh(rule: str, temperature: float, has_rest: bool, like: Tensor) -> Statistics:
        """Statistics of no components yet; ``like`` (S, I) gives shape, dtype and device. A linear rule has none."""
        tables = {name: torch.full_like(like, value) for name, value in _START[rule].items()}
        return Statistics(rule, temperature, has_rest, like.new_zeros(len(like)), tables)

    def on(self, device: torch.device) -> Statistics:
        """The same on another device."""
        tables = {name: table.to(device) for name, table in self.tables.items()}
        return replace(self, alive=self.alive.to(device), tables=tables)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.alive, *self.tables.values()))

    @contextmanager
    def undone_on_failure(self, at: slice) -> Iterator[None]:
        """Put the numbers of some positions back as they were if memory runs out in the midst of a block."""
        tables = {name: table[at].clone() for name, table in self.tables.items()}
        alive = self.alive[at].clone()
        try:
            yield
        except Exception:
            self.alive[at].copy_(alive)
            for name, table in tables.items():
                self.tables[name][at].copy_(table)
            raise

    def meet(self, block: GateBlock, at: slice, part: slice) -> None:
        """Take in a block of components, at some of the positions and neurons. Blocks come in the components' order."""
        g, eligible = block.values, block.eligible
        t = {name: table[at, part] for name, table in self.tables.items()}  # views
        if self.rule == "softmax":
            z, per_t = g.masked_fill(~eligible, -torch.inf), inverse(self.temperature, g.dtype)
            top = torch.maximum(t["top"], z.amax(1))
            finite = top.masked_fill(top == -torch.inf, 0.0)
            met = torch.exp((t["top"] - finite).mul_(per_t))
            t["sum"].mul_(met).add_(z.sub_(finite[:, None]).mul_(per_t).exp_().sum(1))
            t["top"].copy_(top)
        elif self.rule == "linear":
            low = torch.minimum(t["low"], g.masked_fill(~eligible, torch.inf).amin(1))
            finite = low.masked_fill(low == torch.inf, 0.0)
            fallen = torch.where(t["count"] > 0, t["low"] - low, 0.0)
            above = torch.where(eligible, g - finite[:, None], 0.0).sum(1)
            t["sum"].add_(t["count"] * fallen).add_(above)
            t["count"].add_(eligible.sum(1))
            t["low"].copy_(low)
        elif self.rule == "relu":
            t["sum"].add_(torch.where(eligible, g, 0.0).clamp_min(0.0).sum(1))
        elif self.rule == "max":
            g = g.masked_fill(~eligible, -torch.inf)
            top, first = g.max(1)
            winner = block.members[first].to(top.dtype)
            t["winner"].copy_(torch.where(top > t["top"], winner, t["winner"]))
            t["top"].copy_(torch.maximum(t["top"], top))  # NaN stays

    def shares(self, block: GateBlock, at: slice, part: slice) -> Tensor:
        """The weights (n, b, I) of a block's components."""
        g = block.values
        t = {name: table[at, part][:, None] for name, table in self.tables.items()}
        eligible = block.eligible
        if self.rule == "softmax":
            nobody = t["top"] == -torch.inf
            above = (g - t["top"].masked_fill(nobody, 0.0)).clamp_max_(0.0)
            weights = above.mul_(inverse(self.temperature, g.dtype)).exp_()
            weights = weights / t["sum"].masked_fill(nobody, 1.0)
        elif self.rule == "linear":
            nobody, level = t["count"] == 0, t["sum"] == 0
            above = (g - t["low"].masked_fill(nobody, 0.0)) / t["sum"].masked_fill(level, 1.0)
            weights = torch.where(level, 1.0 / t["count"].clamp_min(1.0), above)
        elif self.rule == "relu":
            nobody = t["sum"] == 0
            weights = g.clamp_min(0.0) / t["sum"].masked_fill(nobody, 1.0)
        else:
            nobody = t["top"] == -torch.inf
            weights = (block.members[:, None] == t["winner"]).to(g.dtype)
            weights = torch.where(t["top"].isnan(), t["top"], weights)
        weights = torch.where(eligible, weights, 0.0)
        if self.has_rest:
            fallback = torch.zeros_like(weights[:, :, :1])
            if block.rest is not None:
                fallback[:, block.rest] = 1.0
        else:
            fallback = (block.alive.to(g.dtype) / self.alive[at, None].clamp_min(1.0))[..., None]
        return torch.where(nobody, fallback, weights)
