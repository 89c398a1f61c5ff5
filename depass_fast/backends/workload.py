"""The sizes that every backend's cost model works on: numbers, no model and no tensors.

Each backend's cost model lies beside the backend (``torch/cost.py``, ``triton/cost.py``, ``stream_cost.py``,
``reference_cost.py``) and mirrors its buffers: whoever changes a buffer changes the model next door. The planner makes
the workloads and combines what the models say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..linear_rules import at_once

_BESIDE, _VALUES = 6, 3  # tables beside the coefficients while they are made, and those of a curve's values
_NODES = {True: 8, False: 32}  # values of a curve per coefficient, on a CPU and elsewhere
BUSIEST = 1.4  # times the even share, which one expert of a layer gets
_INDEX = 40  # bytes of indices per row, held along with a state


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
    may_vanish: bool = False  # activations may be exactly zero
    reads_up: bool = False  # the rule looks at the up projection
    shared_values: int = 0  # channels of values whose activation is shared out
    source: int | None = None  # the layer whose values it takes
    ahead: bool = False  # experts read a copy of the state from the layer before
    kernelless: bool = False  # the triton backend leaves its attention to the torch backend
    recurrent: bool = False  # a recurrence mixes the positions
    keys: int = 0  # channels of its keys
    looks: bool = False  # attention stands beside it
    read: int = 1  # streams that values are read from, side by side
    shifted: int = 0  # copies of the state where a branch reads two positions: what it reads, and what an MLP gives
    made: int = 0  # numbers of the weights that are made of several modules' when the layer is reached
    recorded: int = 0  # times D that a position's record is longer in a forward pass than in the trace

    def flop(self, width: int, rows: int, keys: float) -> float:
        """FLOP of ``rows`` rows that meet ``keys`` keys together."""
        attention = 0 if self.skip_attention else 2 * width * (self.read * self.v + self.o) * rows + 2 * self.o * keys
        return attention + 2 * width * self.shared_values * rows + (1 + self.ways_in) * self.gates(width, rows)

    def gates(self, width: int, rows: int) -> float:
        """FLOP of the gates alone."""
        return rows * sum(2 * width * neurons * share for neurons, share in self.mlps)

    @property
    def ways_in(self) -> int:
        """2 where a neuron is driven by gates and ups, else 1."""
        return 2 if self.reads_up else 1

    def parameters(self, width: int) -> float:
        """Weights that a position meets on its way."""
        attention = 2 * self.read * self.v + (1 + self.read) * self.o
        return width * (attention + sum((3 if self.has_up else 2) * n * share for n, share in self.mlps))

    def reached(self, positions: int) -> int:
        """Neurons of all MLPs that so many positions are sent to; of a mixture of experts, at most."""
        sent = [n for n, share in self.mlps if share < 1]
        reached = min(len(sent), round(positions * sum(share for _, share in self.mlps if share < 1)))
        return sum(n for n, share in self.mlps if share == 1) + reached * max(sent, default=0)

    @property
    def parallel(self) -> bool:
        """True if attention and the only MLP read the same."""
        return self.copied and len(self.mlps) == 1

    @property
    def neurons(self) -> int:
        """Neurons of the widest MLP."""
        return max((neurons for neurons, _ in self.mlps), default=0)


@dataclass(frozen=True)
class Workload:
    """A state that is carried through the layers ``passed`` within ``budget`` bytes of workspace.

    ``counts`` are the components of every prompt, ``row_counts`` its rows; ``staggered`` says that components are born
    one after the other. ``state_item`` and ``item`` are bytes per number of the state and of the products; ``casts``
    says that the products' dtype is not the model's. ``float16``: the triton backend's are in float16 with scales;
    ``float16_by_default``: in the place of the model's bfloat16. ``linear_rule`` is the rule's name if it is linear.
    ``made`` are bytes of the state of all components, where it is made for the sake of a rank's part. ``kept``: so many
    copies of the state wait for later layers to read them. A row is ``streams`` times the ``width``, and ``between``
    times between attention and MLP.
    """

    lengths: tuple[int, ...]
    counts: tuple[int, ...]
    row_counts: tuple[int, ...]
    staggered: bool
    width: int
    state_item: int
    item: int
    casts: bool
    float16: bool
    float16_by_default: bool
    budget: int
    on_cpu: bool
    passed: tuple[LayerSize, ...]
    linear_rule: str | None = None
    made: int = 0
    kept: int = 0
    streams: int = 1
    between: int = 1

    @staticmethod
    def join(workloads: Sequence[Workload]) -> Workload:
        """States that are carried together, the first of which has the longest way."""
        counts, rows = ((one.counts for one in workloads), (one.row_counts for one in workloads))
        counts, rows = (tuple(map(sum, zip(*parts, strict=True))) for parts in (counts, rows))
        return replace(workloads[0], counts=counts, row_counts=rows)

    @property
    def rows(self) -> int:
        return sum(self.row_counts)

    @property
    def positions(self) -> int:
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def neurons(self) -> int:
        """Neurons of the widest MLP that is passed."""
        return max((size.neurons for size in self.passed), default=0)

    @property
    def state_bytes(self) -> int:
        return self.rows * self.width * self.streams * self.state_item

    @property
    def flop(self) -> float:
        """FLOP of the state at all positions; a row meets (N + 1) / 2 keys."""
        keys = sum(r * (n + 1) / 2 for r, n in zip(self.row_counts, self.lengths, strict=True))
        frozen = sum(size.gates(self.width, self.positions) for size in self.passed if size.reads_up)  # U
        return sum(size.flop(self.width, self.rows, keys) for size in self.passed) + frozen

    def shared_values(self) -> int:
        """Bytes of the activations of values that are shared out, of their constants, and of who drives them."""
        return 5 * self.positions * max((size.shared_values for size in self.passed), default=0) * max(self.item, 4)

    def gathered(self) -> int:
        """Bytes of W_down transposed and of both weights gathered, where activations may vanish; of all neurons.

        Under a linear rule that is where nothing looks at the up projection.
        """
        neurons = max((size.neurons for size in self.passed if size.may_vanish and not size.reads_up), default=0)
        return 3 * neurons * self.width * self.item

    def rows_at(self, positions: int) -> int:
        """Rows at so many positions, at most."""
        return positions * max(self.counts)

    def sent_rows(self, share: float) -> int:
        """Rows that are sent to an MLP with a ``share`` of the positions, at most."""
        return int(min(1.0, BUSIEST * share) * self.rows)

    def coefficients(self, held: Callable[[int], int], making: bool = True) -> int:
        """Bytes of a linear rule's coefficients, of U, and with ``making`` of what is held while they are made.

        ``held`` gives the positions whose coefficients are held at a time, for so many neurons.
        """
        each = {(size, *mlp) for size in self.passed for mlp in size.mlps} if self.linear_rule else ()
        return max((self._coefficients(*one, held, making) for one in each), default=0)

    def _coefficients(
        self, size: LayerSize, neurons: int, share: float, held: Callable[[int], int], making: bool
    ) -> int:
        positions = int(min(1.0, BUSIEST * share) * self.positions)
        table = min(positions, held(neurons)) * neurons
        made = (size.ways_in * table + making * self._beside(size, table)) * max(4, self.item)
        before = self.positions * 3 * self.width * 4  # of the activations; let go by then
        return max(0, made - before) + size.reads_up * positions * neurons * self.item

    def _beside(self, size: LayerSize, table: int) -> int:
        """Numbers that are held beside a ``table`` of so many coefficients while it is made."""
        some, values = at_once(self.on_cpu)
        some = min(table, some)
        if not size.reads_up:
            return _BESIDE // 2 * some
        at_nodes = min(_NODES[self.on_cpu] * some, values) if self.linear_rule == "shapley" else 0
        return max(_BESIDE * some, 2 * some + _VALUES * at_nodes)

    # -- bytes that are held whatever the backend --------------------------------------------------------------

    def held(self) -> int:
        """Bytes of the state and its copies: those that several MLPs and later layers read, and rows for experts.

        Rows that are sent to the busiest expert are there twice.
        """
        shares = [min(1.0, BUSIEST * share) for size in self.passed for _, share in size.mlps if share < 1]
        sent = 2 * max(shares, default=0.0)
        if self.streams > 1:  # beside them what a branch reads and gives; or what it gives, and as many as come out
            most, read = max(self.streams, self.between), max((size.read for size in self.passed), default=1)
            mixing = 0 if self.streams == self.between else self.streams + self.between + 1
            return int((self.kept + max(most + read + 1 + sent, mixing)) * self.state_bytes / self.streams)
        copied = max((max(size.copied, size.shifted) for size in self.passed), default=0)
        copies = 1 + self.kept + copied + sent
        return int(copies * self.state_bytes)

    def held_on_device(self, joining: bool) -> int:
        """Bytes of :meth:`held`, indices and activations; ``joining``: a state is held twice while another joins it."""
        made = max((size.made for size in self.passed), default=0) * max(4, self.item)
        return self.held() + joining * self.state_bytes + self.rows * _INDEX + self.activations() + made

    def activations(self) -> int:
        """Bytes that a layer's step makes of the trace: at every position a few vectors, and neurons it has to cast."""
        return self.positions * (self.neurons * self.casts * self.item + 3 * self.width * 4)


@dataclass(frozen=True)
class Need:
    """One backend's requirements for a workload: FLOP, and bytes.

    ``workspace`` is bounded by the budget as far as it can be; ``beside`` is on the device as well; ``host`` is what
    lies in host memory instead.
    """

    flop: float
    workspace: int
    beside: int
    host: int = 0
