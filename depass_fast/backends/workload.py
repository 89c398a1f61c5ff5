"""The sizes that every backend's cost model works on: numbers, no model and no tensors."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerSize:
    """The widths of one layer: of V, of what O reads, and of every MLP with the share of positions sent to it."""

    v: int
    o: int
    heads: int
    mlps: tuple[tuple[int, float], ...]
    copied: bool  # a parallel layer, or several MLPs: they read a copy of the state
    has_up: bool
    output_norms: bool
    skip_attention: bool = False

    def flop(self, width: int, rows: int, keys: float) -> float:
        attention = 0 if self.skip_attention else 2 * width * (self.v + self.o) * rows + 2 * self.o * keys
        return attention + rows * sum(4 * width * neurons * share for neurons, share in self.mlps)

    def gates(self, width: int, rows: int) -> float:
        return rows * sum(2 * width * neurons * share for neurons, share in self.mlps)

    def parameters(self, width: int) -> float:
        """Weights that a position meets on its way."""
        return width * (2 * self.v + 2 * self.o + sum((3 if self.has_up else 2) * n * share for n, share in self.mlps))

    def reached(self, positions: int) -> int:
        """Neurons of all MLPs that so many positions are sent to; of a mixture of experts, at most."""
        sent = [n for n, share in self.mlps if share < 1]
        reached = min(len(sent), round(positions * sum(share for _, share in self.mlps if share < 1)))
        return sum(n for n, share in self.mlps if share == 1) + reached * max(sent, default=0)

    @property
    def parallel(self) -> bool:
        """Whether attention and the only MLP read the same."""
        return self.copied and len(self.mlps) == 1

    @property
    def neurons(self) -> int:
        return max(neurons for neurons, _ in self.mlps)
