"""The division of the torch backend's workspace: numbers alone, for the backend and for its cost model.

Half of it is for attention and half for the MLP, whose buffers are kept from layer to layer. On a CPU sizes are those
at which nothing leaves the cache that need not; on a GPU a product is as large as there is room for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

CPU_BUDGET, GPU_BUDGET = 32 << 20, 1 << 30

_TARGET_ROWS = 1024  # rows per MLP chunk beyond which a GEMM on a CPU gains nothing and the gates leave the cache
TARGET_NEURONS = 2048  # the same of neurons
_FEWEST = 16  # neurons at a time


def default_budget(device: torch.device) -> int:
    """Return the bytes of workspace that a backend takes unless told otherwise."""
    return CPU_BUDGET if device.type == "cpu" else GPU_BUDGET


@dataclass(frozen=True)
class Division:
    """``budget`` bytes for products of ``item`` bytes per number on a state of ``state_item``, on a CPU or a GPU.

    ``ways_in``: under a linear rule, 2 where a neuron is driven by gates and ups, else 1. None: components compete.
    """

    budget: int
    item: int
    state_item: int
    on_cpu: bool
    ways_in: int | None = None

    @property
    def gate(self) -> int:
        """Bytes of a gate: in the product's dtype, and once more in float32 if that is half precision.

        Under a linear rule it is those of the gate and of the up, in the product's dtype alone.
        """
        if self.ways_in is not None:
            return self.ways_in * self.item
        return self.item if self.item >= 4 else self.item + 4

    def slots(self, width: int, v: int, o: int) -> int:
        """Places, components times positions, in a block of attention."""
        return max(1, self.budget // (2 * (width + 2 * (o + v)) * self.item))

    def query_slots(self, width: int, o: int, heads: int, positions: int) -> int:
        """Places in a block of which few queries are read: every head holds a sum of the states it looks at."""
        place = width * (self.state_item + 2 * self.item) + (heads * width + 2 * o) * self.item // positions
        return max(1, self.budget // (2 * place))

    def products(self, width: int, heads: int, positions: int, later: bool) -> int:
        """Components that have just started, at a time; from those born ``later`` the living are picked out."""
        picked = 0 if self.on_cpu or not later else positions * (self.item + self.state_item)
        return max(1, self.budget // (2 * width * ((positions + heads) * self.item + picked)))

    def tile(self, item: int) -> int:
        """Numbers of ``item`` bytes in a tile of P; three such tiles are held at a time."""
        return self.budget // ((4 if self.on_cpu else 16) * item)

    def rows(self, width: int, n_neurons: int, n_rows: int, longest: int) -> int:
        """Rows in a chunk of the MLP, of a state of ``n_rows`` with up to ``longest`` at a position."""
        if not self.on_cpu:
            return max(1, self.budget // (2 * (n_neurons * self.gate + width * self.item)))
        columns = (self.ways_in or 1) * min(n_neurons, TARGET_NEURONS) + width
        rows = max(1, self.budget // (2 * columns * self.item))
        # of equal size: a small one at the end would cost as much as a whole one
        return min(rows, -(-n_rows // max(1, round(n_rows / _TARGET_ROWS))) + longest - 1)

    def neurons(self, width: int, n_neurons: int, n_rows: int) -> int:
        """Neurons at a time for a chunk of ``n_rows``; with fewer than all, outputs are added up apart."""
        if self.on_cpu:
            size = min(self.budget // (2 * n_rows * self.item * (self.ways_in or 1)), TARGET_NEURONS)
        elif 2 * n_rows * (n_neurons * self.gate + width * self.item) <= self.budget:
            return n_neurons
        else:
            held = n_rows * width * (self.item + self.state_item)
            room = max(self.budget // 2 - held, self.budget // 8)  # a position's rows can be more than all of it
            size = room // (n_rows * self.gate)
        parts = -(-n_neurons // max(_FEWEST, min(n_neurons, size)))
        return -(-n_neurons // parts)

    def positions(self, n_neurons: int) -> int:
        """Positions of which a linear rule's coefficients are held at a time."""
        return max(1, self.budget // (4 * 2 * n_neurons * max(self.item, 4)))
