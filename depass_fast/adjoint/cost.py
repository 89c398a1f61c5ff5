"""What a sweep will take: bytes at its peak and FLOP, from shapes alone, as :mod:`depass_fast.job_size` does for exact.

What is held at once is listed block by block, in the order of the sweep: the starts, a layer's attention, its MLP, the
way back, and the components that are propagated by themselves. How many components are loud is not known before a
prompt is traced; everything is told for a given number of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..backends.workload import LayerSize
from ..options import Adjoint
from .forward import Settings
from .memory import SweepMemory, gates_room, journeys_at_once, positions_at_once

_NAME = 80  # bytes of a label, in the lists that it is in
_PROBABILITIES = 1 << 28  # elements, above which those of all layers are not kept (as in maps)


@dataclass(frozen=True)
class StartSize:
    """One start layer: ``named`` components that enter layer ``entering``; ``extras``: `rest`, and `bias` if any.

    ``held`` are the bytes of what it is made of, beyond the trace and the model, ``making`` those of its making.
    """

    entering: int
    named: int
    extras: int
    held: int
    making: int


@dataclass(frozen=True)
class SweepWorkload:
    """One prompt's sweep over the layers up to ``end``; ``loud`` components of every start, as far as they may be.

    ``item`` are bytes per number of rows, ``compute`` those of products. ``copies`` says that the model's weights do
    not serve as they are, so that a layer's are copied; ``records`` that what was recorded does not.
    """

    room: SweepMemory
    layers: list[LayerSize]
    starts: list[StartSize]
    end: int
    method: Adjoint
    softmax: bool
    loud: int
    item: int
    compute: int
    heads: int
    copies: bool
    records: bool

    def peak(self, workspace: int) -> int:
        """Bytes beyond the trace and the model."""
        held = sum(start.held + _NAME * start.named for start in self.starts) + self._maps()
        return held + max(sum(blocks) for blocks in self._phases(workspace))

    def _rows(self, start: StartSize, refined: bool) -> int:
        """Explicit rows of a start: the refined are for the most part its loud ones."""
        if start.entering >= self.end or not self.softmax:
            return start.extras
        within = sum(other.entering < self.end for other in self.starts) if self.method.within == "all" else 1
        fixed = min(start.named, -(-self.method.refine // within)) if refined else 0
        loud = min(self.loud, start.named, self.room.most_loud(Settings.at_most))
        return 1 + start.extras + max(loud, fixed)

    def rows(self) -> int:
        """Explicit rows of all starts."""
        return sum(self._rows(start, bool(self.method.refine)) for start in self.starts)

    def _groups(self, workspace: int) -> list[list[StartSize]]:
        lengths, most = [self.end - start.entering for start in self.starts], max(s.named for s in self.starts)
        parts = self.room.groups(lengths, most, Settings.at_most, workspace)
        return [self.starts[part] for part in parts]

    def _queries(self, index: int) -> int:
        return 1 if index == self.end - 1 else self.room.n

    # -- bytes ----------------------------------------------------------------------------------------------------

    def _maps(self) -> int:
        """What is kept of layers between the ways there and back, or held of two of them."""
        first = min(start.entering for start in self.starts)
        passed = range(first, self.end)
        if not passed:
            return 0
        n, width = self.room.n, self.room.width
        probabilities = self.heads * n * n * self.compute
        records = max(2 * self._queries(i) * self.layers[i].reached(n) for i in passed) * self.item * self.records
        if self.copies:
            weights = max(self.layers[i].v + self.layers[i].o + 2 * self.layers[i].reached(n) for i in passed)
            return 2 * (weights * width * self.compute + records + probabilities)
        if self.end * self.heads * n * n > _PROBABILITIES:
            return 2 * (records + probabilities)
        return sum(probabilities * (self._queries(i) > 1) for i in passed) + records * len(passed)

    def _phases(self, workspace: int) -> Iterator[list[int]]:
        yield [max(start.making for start in self.starts)]
        n, item = self.room.n, self.item
        for group in self._groups(workspace):
            for refined in (False, True) if self.method.refine and self.softmax else (False,):
                tables: list[int] = []
                entered = rows = 0
                for index in range(group[0].entering, self.end):
                    joining = [start for start in group if start.entering == index]
                    new = sum(self._rows(start, refined) for start in joining)
                    entered, rows = entered + len(joining), rows + new
                    yield [*tables, rows * self.room.row, *[new * self.room.row] * 2, (rows - new) * self.room.row]
                    for blocks in self._attention(index, rows):
                        yield tables + blocks
                    yield tables + self._mlp(index, rows, entered, workspace)
                    table = entered * self._queries(index) * self.layers[index].reached(n) * item
                    tables += [table] * 3 if self.softmax else []
                    yield tables + self._back(index, entered)
                if self.method.sample and self.softmax:
                    for blocks in self._sampled(group, workspace):
                        yield tables + blocks
            yield [n * max(start.named for start in group) * item] * 2

    def _attention(self, index: int, rows: int) -> Iterator[list[int]]:
        size, n, width = self.layers[index], self.room.n, self.room.width
        p = self.heads * n * min(n, self._queries(index)) * 4
        here, values, mixed = rows * n * width * self.item, rows * n * size.v * self.compute, size.o * self.compute
        mixed *= rows * self._queries(index)
        cast = [rows * n * width * self.compute] if self.compute != self.item else []
        yield [here, here, *cast, values]
        yield [here, values, *[mixed] * 3]
        yield [here, values, p]  # and once more, as they are kept or held (maps)

    def _mlp(self, index: int, rows: int, starts: int, workspace: int) -> list[int]:
        n, width, queries = self.room.n, self.room.width, self._queries(index)
        neurons = self.layers[index].reached(n)
        q = min(queries, positions_at_once(gates_room(workspace), rows, neurons, self.item))
        gates, read = rows * q * neurons, rows * q * width * self.item
        cast = [gates * self.compute] if self.compute != self.item else []
        small = [starts * q * neurons * self.item] * 8
        here = [rows * queries * width * self.item] * (1 + self.layers[index].parallel)  # and what a parallel MLP reads
        return [*here, gates * self.item, *(cast or [gates]), read, *small]

    def _back(self, index: int, starts: int) -> list[int]:
        size, n, queries = self.layers[index], self.room.n, self._queries(index)
        y, back = starts * queries * size.reached(n) * self.item, starts * self.room.row
        return [*[y] * 3, *[back] * 3, *[starts * n * size.o * self.compute] * 3]

    def _sampled(self, group: list[StartSize], workspace: int) -> Iterator[list[int]]:
        """Half of the sample, with which log Z is measured, and the other half; drawn from all starts alike."""
        n, item, room = self.room.n, self.item, gates_room(workspace)
        drawn = min(self.method.sample, sum(start.named for start in self.starts))
        for count, measure in ((drawn - drawn // 2, True), (drawn // 2, False)):
            most = journeys_at_once(room, n, self.room.widest, item, measure)
            for index in range(group[0].entering, self.end):
                entered = sum(start.entering <= index for start in group)
                rows = min(-(-count * entered // len(self.starts)), most)
                gates = rows * self._queries(index) * self.layers[index].reached(n) * item
                halves = [gates * 2 * entered // rows] if measure else []
                yield [*[gates] * (8 if measure else 6), *halves, rows * self.room.row]
                yield from self._attention(index, rows)

    # -- FLOP -----------------------------------------------------------------------------------------------------

    def flop(self, workspace: int) -> float:
        """Of all products, for one target."""
        total, groups = 0.0, self._groups(workspace)
        n, width = self.room.n, self.room.width
        refines = bool(self.method.refine) and self.softmax
        for group in groups:
            for refined in (False, True) if refines else (False,):
                for index in range(group[0].entering, self.end):
                    under_way = [start for start in group if start.entering <= index]
                    rows = sum(self._rows(start, refined) for start in under_way) + len(under_way)  # and back
                    total += self._layer_flop(index, rows)
                total += sum(6 * n * width * start.named for start in group)  # sums with signs, and the scores
        if self.method.sample and self.softmax:
            drawn = min(self.method.sample, sum(start.named for start in self.starts))
            for index in range(self.starts[0].entering, self.end):
                entered = sum(start.entering <= index for start in self.starts)
                total += self._layer_flop(index, drawn * entered / len(self.starts))
        return total

    def _layer_flop(self, index: int, rows: float) -> float:
        """Of ``rows`` components, or gradients, at the positions where the layer is needed."""
        size, n, width, queries = self.layers[index], self.room.n, self.room.width, self._queries(index)
        keys = n * n if queries > 1 else n  # tiles are whole, without regard to what is masked
        attention = 2 * width * (size.v * n + size.o * queries) * rows + 2 * size.o * keys * rows
        return attention + 2 * size.o * keys + rows * queries * 4 * width * size.reached(n)
