"""The cost of a sweep: bytes at its peak and FLOP, from shapes alone, as :mod:`depass_fast.planning.exact` for exact.

Bytes that are held at once are listed block by block, in the order of the sweep: the starts, a layer's attention, its
MLP, the way back, and the components that are propagated by themselves. The number of loud components is not known
before a prompt is traced; everything is told for a given number of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..backends.workload import LayerSize
from ..options import Adjoint
from .approximation import Approximation
from .estimate import FEWEST_OF_A_LAYER, IN_DANGER
from .loud import CANDIDATES
from .memory import SweepMemory, gates_budget, positions_at_once, singles_at_once
from .stack import KEPT

_NAME = 80  # bytes of a label in all lists that hold it


@dataclass(frozen=True)
class StartSize:
    """One start layer: ``named`` components that enter layer ``entering``; ``extras``: `rest`, and `bias` if any.

    ``held`` are its bytes beyond the trace and the model, ``making`` those that its making takes for a while.
    """

    entering: int
    named: int
    extras: int
    held: int
    making: int


@dataclass(frozen=True)
class SweepWorkload:
    """One prompt's sweep over the layers up to ``end``, with up to ``loud`` loud components of every start.

    ``item`` are bytes per number of rows, ``compute`` those of products. ``copies`` says that a layer's weights are
    copied because the model's do not serve as they are, ``records`` the same of what was recorded.
    """

    memory: SweepMemory
    layers: list[LayerSize]
    starts: list[StartSize]
    end: int
    method: Adjoint
    loud: int
    item: int
    compute: int
    heads: int
    copies: bool
    records: bool

    def peak(self, workspace: int) -> int:
        """Return the peak in bytes, beyond the trace and the model."""
        held = sum(start.held + _NAME * start.named for start in self.starts) + self._maps()
        return held + max(sum(blocks) for blocks in self._phases(workspace))

    def _rows(self, start: StartSize, refined: bool) -> int:
        """Return the explicit rows of a start; the refined are for the most part its loud ones."""
        if start.entering >= self.end:
            return start.extras
        within = sum(other.entering < self.end for other in self.starts) if self.method.within == "all" else 1
        fixed = min(start.named, -(-self.method.refine // within)) if refined else 0
        loud = min(self.loud, start.named, self.memory.most_loud(Approximation.at_most))
        return 1 + start.extras + max(loud, fixed)

    def _heard(self, start: StartSize) -> int:
        """Return the most components whose gates are looked at ahead (:mod:`.loud`); quiet ones are not."""
        if start.entering >= self.end:
            return 0
        return min(start.named, CANDIDATES * self.memory.most_loud(Approximation.at_most))

    @property
    def _drawn(self) -> int:
        """Return the components of the sample, of all starts."""
        by_layer = max(FEWEST_OF_A_LAYER, self.method.sample // (2 * len(self.starts))) + IN_DANGER
        return min(self.method.sample + by_layer * len(self.starts), sum(start.named for start in self.starts))

    def rows(self) -> int:
        """Return the explicit rows of all starts."""
        return sum(self._rows(start, bool(self.method.refine)) for start in self.starts)

    def _groups(self, workspace: int) -> list[list[StartSize]]:
        lengths, most = [self.end - start.entering for start in self.starts], max(s.named for s in self.starts)
        parts = self.memory.groups(lengths, most, Approximation.at_most, workspace)
        return [self.starts[part] for part in parts]

    def _queries(self, index: int) -> int:
        return 1 if index == self.end - 1 else self.memory.n

    # -- bytes ----------------------------------------------------------------------------------------------------

    def _maps(self) -> int:
        """Return the bytes of layers that are kept between the ways there and back, or held of two of them."""
        first = min(start.entering for start in self.starts)
        passed = range(first, self.end)
        if not passed:
            return 0
        n, width = self.memory.n, self.memory.width
        probabilities = self.heads * n * n * self.compute
        records = max(map(self._recorded, passed))
        if self.copies:
            weights = max(self.layers[i].v + self.layers[i].o + 2 * self.layers[i].reached(n) for i in passed)
            return 2 * (weights * width * self.compute + records + probabilities)
        if self.end * self.heads * n * n > KEPT:
            return 2 * (records + probabilities)
        return sum(probabilities * (self._queries(i) > 1) for i in passed) + records * len(passed)

    def _recorded(self, index: int) -> int:
        """Return the bytes of a layer's activations and gates beside the trace; kernels read those of one MLP there."""
        size = self.layers[index]
        if not self.records or (self._fused and len(size.mlps) == 1):
            return 0
        return 2 * self._queries(index) * size.reached(self.memory.n) * (self.compute if self._fused else self.item)

    def _passes(self) -> tuple[bool, ...]:
        """Return for every pass there and back if the refined components are explicit in it."""
        return (False, True) if self.method.refine else (False,)

    def _phases(self, workspace: int) -> Iterator[list[int]]:
        """Yield the blocks that are held at once, phase by phase."""
        yield [max(start.making for start in self.starts)]
        heard = sum(map(self._heard, self.starts))
        gates = min(heard * self.memory.widest * self.compute, gates_budget(workspace))
        yield [heard * 2 * self.memory.width * self.item, gates]
        for group in self._groups(workspace):
            for refined in self._passes():
                yield from self._pass(group, refined, workspace)
            yield [self.memory.n * max(start.named for start in group) * self.item] * 2

    def _pass(self, group: list[StartSize], refined: bool, workspace: int) -> Iterator[list[int]]:
        """Yield the phases of one pass there and back; the tables of the layers passed lie beside each."""
        row = self.memory.row
        tables: list[int] = []
        entered = rows = 0
        for index in range(group[0].entering, self.end):
            joining = [start for start in group if start.entering == index]
            new = sum(self._rows(start, refined) for start in joining)
            entered, rows = entered + len(joining), rows + new
            yield [*tables, rows * row, *[new * row] * 2, (rows - new) * row]
            for blocks in self._attention(index, rows):
                yield tables + blocks
            yield tables + self._mlp(index, rows, entered, workspace)
            table = entered * self._queries(index) * self.layers[index].reached(self.memory.n) * self.item
            tables += [table] * 3
            yield tables + self._back(index, entered)
        if self.method.sample:
            for blocks in self._sampled(group, workspace):
                yield tables + blocks

    @property
    def _fused(self) -> bool:
        """True where kernels do what lies between the products (:mod:`.fused`): on a GPU, for rows in float32."""
        return self.memory.cuda and self.item == 4

    def _attention(self, index: int, rows: int) -> Iterator[list[int]]:
        size, n, width = self.layers[index], self.memory.n, self.memory.width
        p = self.heads * n * min(n, self._queries(index)) * 4
        here, values, mixed = rows * n * width * self.item, rows * n * size.v * self.compute, size.o * self.compute
        mixed *= rows * self._queries(index)
        if self._fused:  # the product adds to the rows by itself
            yield [here, rows * n * width * self.compute, values]
            yield [here, values, max(values, mixed), mixed]
        else:
            cast = [rows * n * width * self.compute] if self.compute != self.item else []
            yield [here, here, *cast, values]
            yield [here, values, *[mixed] * 3]
        yield [here, values, p]  # and once more, as they are kept or held (maps)

    def _mlp(self, index: int, rows: int, starts: int, workspace: int) -> list[int]:
        n, width, queries = self.memory.n, self.memory.width, self._queries(index)
        neurons = self.layers[index].reached(n)
        if self._fused:
            q = min(queries, positions_at_once(gates_budget(workspace), rows, neurons, self.compute, held=2))
            here = rows * queries * width
            table = starts * queries * neurons * self.item  # three of them are the way back's
            read = here * self.compute
            return [
                here * self.item * (1 + self.layers[index].parallel),
                read,
                rows * q * neurons * self.compute,
                *[table] * 3,
            ]
        q = min(queries, positions_at_once(gates_budget(workspace), rows, neurons, self.item))
        gates, read = rows * q * neurons, rows * q * width * self.item
        cast = [gates * self.compute] if self.compute != self.item else []
        small = [starts * q * neurons * self.item] * 8
        here = [rows * queries * width * self.item] * (1 + self.layers[index].parallel)  # and what a parallel MLP reads
        return [*here, gates * self.item, *(cast or [gates]), read, *small]

    def _back(self, index: int, starts: int) -> list[int]:
        size, n, queries = self.layers[index], self.memory.n, self._queries(index)
        neurons, back = starts * queries * size.reached(n), starts * self.memory.row
        y = [neurons * self.compute] if self._fused else [neurons * self.item] * 3
        return [*y, *[back] * 3, *[starts * n * size.o * self.compute] * 3]

    def _sampled(self, group: list[StartSize], workspace: int) -> Iterator[list[int]]:
        """Yield the phases of the sample: the part that measures log Z, then the others; all starts give alike."""
        n, item, budget = self.memory.n, self.item, gates_budget(workspace)
        half = min(self._drawn, self.method.sample - self.method.sample // 2)
        for count, measure in ((half, True), (self._drawn - half, False)):
            most = singles_at_once(budget, n, self.memory.widest, item, measure)
            for index in range(group[0].entering, self.end):
                entered = sum(start.entering <= index for start in group)
                rows = min(-(-count * entered // len(self.starts)), most)
                gates = rows * self._queries(index) * self.layers[index].reached(n) * item
                halves = [gates * 2 * entered // rows] if measure else []
                yield [*[gates] * (8 if measure else 6), *halves, rows * self.memory.row]
                yield from self._attention(index, rows)

    # -- FLOP -----------------------------------------------------------------------------------------------------

    def flop(self, workspace: int) -> float:
        """Return the FLOP of all products, for one target."""
        passes = sum(self._pass_flop(group, refined) for group in self._groups(workspace) for refined in self._passes())
        heard = sum(self._heard(start) * self._neurons_ahead(start) for start in self.starts)
        sampled = self._sample_flop() if self.method.sample else 0.0
        return passes + 2.0 * self.memory.width * heard + sampled

    def _neurons_ahead(self, start: StartSize) -> int:
        return sum(self.layers[index].reached(self.memory.n) for index in range(start.entering, self.end))

    def _pass_flop(self, group: list[StartSize], refined: bool) -> float:
        """Return the FLOP of one pass there and back."""
        total = 0.0
        for index in range(group[0].entering, self.end):
            under_way = [start for start in group if start.entering <= index]
            rows = sum(self._rows(start, refined) for start in under_way) + len(under_way)  # and back
            total += self._layer_flop(index, rows)
        # sums with signs, and the scores
        return total + sum(6 * self.memory.n * self.memory.width * start.named for start in group)

    def _sample_flop(self) -> float:
        """Return the FLOP of the sample; all starts give alike."""
        total = 0.0
        for index in range(self.starts[0].entering, self.end):
            entered = sum(start.entering <= index for start in self.starts)
            total += self._layer_flop(index, self._drawn * entered / len(self.starts))
        return total

    def _layer_flop(self, index: int, rows: float) -> float:
        """Return the FLOP of ``rows`` components, or gradients, at the positions where the layer is needed."""
        n, width = self.memory.n, self.memory.width
        size, queries = self.layers[index], self._queries(index)
        keys = n * n if queries > 1 else n  # tiles are whole, without regard to what is masked
        attention = 2 * width * (size.v * n + size.o * queries) * rows + 2 * size.o * keys * rows
        return attention + 2 * size.o * keys + rows * queries * 4 * width * size.reached(n)
