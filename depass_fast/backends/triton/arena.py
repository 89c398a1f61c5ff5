"""The division of the triton backend's workspace: numbers alone, for the backend and its cost model, without Triton.

One arena holds what a piece of attention or a chunk of the MLP needs, all of its parts side by side; attention and MLP
take turns in it.
"""

from __future__ import annotations

from dataclasses import dataclass

_ONE_TILE = 64  # positions of a prompt whose probabilities one tile holds; see kernels/launch.py
_FEWEST = 64  # neurons per block, and multiples of that: what a product likes


@dataclass(frozen=True)
class Arena:
    """An arena of about ``budget`` bytes, for products of ``item`` bytes per number on a state of ``state_item``."""

    budget: int
    item: int
    state_item: int

    def rows(self, columns: int) -> int:
        """The number of rows of ``columns`` numbers that are carried at once."""
        return max(1, self.budget // (columns * self.item))

    def probabilities(self, positions: int, heads: int, longest: int) -> int:
        """Bytes of all probabilities of a layer, for prompts of up to ``longest`` positions."""
        return positions * heads * -(-longest // 16) * 16 * self.item

    def stores(self, positions: int, heads: int, longest: int) -> bool:
        """True if a layer's probabilities are stored beside the arena: of long prompts, up to a quarter of its size."""
        return longest > _ONE_TILE and 4 * self.probabilities(positions, heads, longest) <= self.budget

    @staticmethod
    def attention_columns(width: int, v: int, o: int) -> tuple[int, int]:
        """Columns per row of attention's two buffers: rows as read, then mixed values; values, then what is written."""
        return max(width, o), max(width, v)

    def neurons(self, n_rows: int, n_neurons: int, width: int, ways_in: int = 1) -> tuple[int, bool]:
        """Neurons at a time for a chunk: all, or as many as fit; True if outputs are added up apart.

        ``ways_in`` is 2 where a neuron is driven by gates and ups, else 1.
        """
        each = n_rows * self.item
        if self.budget // each >= ways_in * n_neurons + width:
            return n_neurons, False
        held = width * (each + n_rows * self.state_item)
        left = max(self.budget - held, self.budget // 4)  # a position's rows can be more than all of it
        blocks = -(-n_neurons // max(left // (ways_in * each), _FEWEST))
        return min(n_neurons, -(-n_neurons // (_FEWEST * blocks)) * _FEWEST), True

    def mlp_sizes(self, n_rows: int, n_neurons: int, width: int, ways_in: int = 1) -> tuple[int, ...]:
        """Bytes of the parts of a chunk: rows as they are read, gates, marks of the living, outputs apart, ups."""
        size, apart = self.neurons(n_rows, n_neurons, width, ways_in)
        rows, gates = n_rows * width * self.item, n_rows * size * self.item
        return rows, gates, n_rows, apart * n_rows * width * self.state_item, (ways_in - 1) * gates

    def positions(self, n_neurons: int) -> int:
        """Positions of which a linear rule's coefficients are held at a time, beside the arena."""
        return max(1, self.budget // (4 * 2 * n_neurons * 4))

    def attention_bytes(self, rows: int, least: int, width: int, v: int, o: int) -> int:
        """Bytes for attention on a state of ``rows``, of which no piece has fewer than ``least``."""
        columns = sum(self.attention_columns(width, v, o))
        return min(rows, max(self.rows(columns), least)) * columns * self.item

    def mlp_bytes(self, rows: int, least: int, n_neurons: int, width: int, ways_in: int = 1) -> int:
        """Bytes for the MLP on a state of ``rows``, of which no chunk has fewer than ``least``."""
        chunk = min(rows, max(self.rows(ways_in * n_neurons + width), least))
        return sum(self.mlp_sizes(chunk, n_neurons, width, ways_in))
