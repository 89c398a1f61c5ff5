"""What a decomposition holds at its peak, part by part, and what every backend needs for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ..backends.torch.division import TARGET_NEURONS, Division
from ..backends.triton.arena import Arena
from ..backends.workload import LayerSize
from .plan import BackendEstimate
from .shapes import ForwardPass

RESIDENT = ("torch", "triton")  # backends whose state is on the device, in jagged rows, and whose workspace is bounded
_BUSIEST = 1.4  # times the even share, which one expert of a layer gets
_INDEX = 40  # bytes of indices per row, held along with a state


@dataclass(frozen=True)
class Workload:
    """A state carried through the layers ``passed``, and the parts of the peak, in bytes.

    ``counts`` are the components of every prompt and ``rows_of`` its rows; ``staggered`` says that components are born
    one after the other.
    """

    lengths: tuple[int, ...]
    counts: tuple[int, ...]
    rows_of: tuple[int, ...]
    staggered: bool
    width: int
    state: torch.dtype
    compute: torch.dtype
    model: torch.dtype
    budget: int
    on_cpu: bool
    passed: tuple[LayerSize, ...]

    @property
    def rows(self) -> int:
        return sum(self.rows_of)

    @property
    def positions(self) -> int:
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def state_bytes(self) -> int:
        return self.rows * self.width * self.state.itemsize

    @property
    def flop(self) -> float:
        """Of the state at all positions; a row meets (N + 1) / 2 keys."""
        keys = sum(r * (n + 1) / 2 for r, n in zip(self.rows_of, self.lengths, strict=True))
        return sum(size.flop(self.width, self.rows, keys) for size in self.passed)

    @staticmethod
    def join(jobs: Sequence[Workload]) -> Workload:
        """States that are carried together, the first of which has the longest way."""
        counts, rows = ((job.counts for job in jobs), (job.rows_of for job in jobs))
        counts, rows = (tuple(map(sum, zip(*parts, strict=True))) for parts in (counts, rows))
        return replace(jobs[0], counts=counts, rows_of=rows)

    def copies(self) -> float:
        """States held at once: what several MLPs read and, twice, what is sent to the busiest of them."""
        shares = [min(1.0, _BUSIEST * share) for size in self.passed for _, share in size.mlps if share < 1]
        sent = max(shares, default=0.0)
        return 1 + any(size.copied for size in self.passed) + 2 * sent

    def weight_copies(self, folds: bool = True) -> int:
        """Weights with a norm folded into them, where a backend ``folds`` it, and what has to change its dtype."""
        if not folds:
            pairs = [pair for size in self.passed for pair in ((size.v, size.o), *((n, n) for n, _ in size.mlps))]
            cast, normed = self.compute != self.model, any(size.output_norms for size in self.passed)
            most = max((own * cast + out * (cast or normed) for own, out in pairs), default=0)
            return self.width * most * self.compute.itemsize
        folded = max((size.v + size.neurons for size in self.passed), default=0)
        cast = self.compute != self.model
        changed = max((max(size.o, size.neurons) * (cast or size.output_norms) for size in self.passed), default=0)
        return self.width * (folded + changed) * self.compute.itemsize

    def activations(self) -> int:
        """What a layer's step makes of the trace, per position."""
        cast = max((size.neurons for size in self.passed), default=0) * (self.compute != self.model)
        return self.positions * (cast * self.compute.itemsize + 3 * self.width * 4)

    def workspace(self) -> int:
        """Of the torch backend: buffers for blocks of attention and chunks of the MLP, and tiles of P."""
        if not self.passed:
            return 0
        return self._workspace_on_a_cpu() if self.on_cpu else self._workspace_on_a_gpu()

    def _workspace_on_a_cpu(self) -> int:
        item = self.compute.itemsize
        attention = max(self.width + 2 * (size.o + size.v) for size in self.passed)
        mlp = max(self.width + min(size.neurons, TARGET_NEURONS) for size in self.passed)
        rows = min(self.rows, self.budget // (2 * min(attention, mlp) * item) + self.longest)
        tiles = 3 * min(self.budget // 4, 4 * self.longest**2 * max(size.o for size in self.passed) // 64)
        return min(self.budget, rows * max(attention, mlp) * item) + tiles

    def _workspace_on_a_gpu(self) -> int:
        """Buffers are kept up to the last layer; of attention and MLP, one goes into the other's where it can."""
        division, item, most = self.division, self.compute.itemsize, 0
        for size in set(self.passed):
            slots, alone = self._block(division.slots(self.width, size.v, size.o))
            kept = slots * (size.v + size.o) * item + (0 if alone else slots * self.width * self.state.itemsize)
            shared = slots * max(size.v, size.o) * item
            passing = max(slots * self.width * item, 3 * min(self.budget // 16, 4 * self.longest**2 * size.heads))
            for neurons, share in set(size.mlps):
                n_rows, longest = int(min(1.0, _BUSIEST * share) * self.rows), max(self.counts)
                n_rows = min(n_rows, max(division.rows(self.width, neurons, n_rows, longest), longest))
                part = division.neurons(self.width, neurons, max(1, n_rows))
                apart = 0 if part == neurons else self.width * self.state.itemsize
                gates = n_rows * (self.width * item + apart + part * (division.gate - item))
                most = max(most, kept + max(shared, n_rows * part * item) + gates + passing, self.queries(size))
        return most

    def queries(self, size: LayerSize) -> int:
        """Of few queries in the last layer: a block's rows, twice in the products' dtype, and sums of them."""
        item, width = self.compute.itemsize, self.width
        slots, alone = self._block(self.division.query_slots(width, size.o, size.heads, max(1, min(self.lengths))))
        alive = 3 * slots // 4 if self.staggered else slots  # of a block that begins with its components' births
        rows = (0 if alone else alive * width * self.state.itemsize) + alive * width * item
        sums = slots // self.longest * (size.heads * width + 2 * size.o) * item
        read = sum(self.counts) * width * self.state.itemsize  # what the layer makes of one position
        return rows + self.staggered * slots * width * item + sums + read

    def _block(self, slots: int) -> tuple[int, bool]:
        """Places in a block of attention for so many ``slots``, and whether that is all of the longest prompt."""
        most = max(self.counts)
        together = min(most, max(64, self.longest // 4)) if self.staggered else most
        return min(max(slots, self.longest), self.longest * together), together == most <= slots // self.longest

    @property
    def division(self) -> Division:
        return Division(self.budget, self.compute.itemsize, self.state.itemsize, self.on_cpu)

    def triton_workspace(self) -> int:
        """Of the triton backend: its arena, or what the last layer's few queries take, as with torch."""
        if not self.passed:
            return 0
        last = self.passed[-1]
        return max(self.arena(), self.queries(last) + last.v * self.width * self.compute.itemsize)

    def arena(self) -> int:
        """What attention and MLP of the triton backend take turns in."""
        arena, most = Arena(self.budget, self.compute.itemsize, self.state.itemsize), 0
        for size in self.passed:
            most = max(most, arena.attention_bytes(self.rows, self.longest, self.width, size.v, size.o))
            for neurons, share in size.mlps:
                rows = int(min(1.0, _BUSIEST * share) * self.rows)
                most = max(most, arena.mlp_bytes(rows, max(self.counts), neurons, self.width))
        return most

    def dense_workspace(self) -> int:
        """Of the reference backend: dense blocks of one prompt, several at a time."""
        if not self.passed:
            return 0
        attention = max(4 * self.width + 3 * size.o for size in self.passed)
        mlp = max(3 * self.width + 6 * size.neurons for size in self.passed)
        return self.longest * max(self.counts) * max(attention, mlp) * self.state.itemsize

    def stream_workspace(self) -> int:
        """Of the torch backend where the state streams: a block's rows four times over, and its gates in parts."""
        if not self.passed:
            return 0
        neurons = max(size.neurons for size in self.passed)
        slots = self.budget // (2 * (self.width + 2 * min(neurons, 512)) * self.compute.itemsize)
        slots = min(max(slots, self.longest), self.longest * max(self.counts))
        gates = min(3 * self.budget // 4, 6 * slots * neurons * 4)
        return max(self.workspace(), 4 * slots * self.width * self.state.itemsize + gates)

    def statistics(self) -> int:
        """What streaming keeps of all components at one MLP, for most rules two numbers per position and neuron.

        And the same of one prompt once more, as it was before a block.
        """
        wide = torch.promote_types(self.compute, torch.float32).itemsize
        return 2 * (self.positions + self.longest) * max((size.neurons for size in self.passed), default=0) * wide

    def gates_again(self) -> float:
        """FLOP that streaming adds: the gates are computed in both passes."""
        return sum(size.gates(self.width, self.rows) for size in self.passed)


def estimates(
    groups: Sequence[Sequence[Workload]], forward: ForwardPass, rates: Mapping[str, float | None]
) -> tuple[BackendEstimate, ...]:
    """What every backend of ``rates`` needs for ``groups`` of states that are carried together if it can do that.

    ``rates`` are FLOP per second, None where that is not known.
    """
    alone = [_needs(job) for group in groups for job in group]
    joined = [_needs_together(group) for group in groups]
    found = []
    for name, rate in rates.items():
        parts, flop = joined if name in RESIDENT else alone, sum(needs[name].flop for needs in alone)
        most = max((needs[name] for needs in parts), key=lambda need: need.workspace + need.beside)
        peak = max(forward.peak, forward.held + most.beside + most.workspace)
        seconds = None if rate is None else (flop + forward.flop) / rate
        found.append(BackendEstimate(name, flop, most.workspace, peak, forward.peak, most.host, seconds))
    return tuple(found)


def _needs_together(group: Sequence[Workload]) -> dict[str, _Need]:
    """Of states that are carried together, up to the last layer: of those that pass it there is one position left."""
    under_way = [job for job in group if len(job.passed) > 1] or group[:1]
    return _needs(Workload.join(under_way), len(under_way) > 1)


class _Need(NamedTuple):
    """FLOP, and bytes: of workspace, of what is on the device beside it, and in host memory."""

    flop: float
    workspace: int
    beside: int
    host: int


def _needs(job: Workload, joining: bool = False) -> dict[str, _Need]:
    """Of every backend; ``joining``: a state is held twice while one more joins it."""
    held, flop = int(job.copies() * job.state_bytes), job.flop
    away = 0 if job.on_cpu else held  # a CPU's memory is the host's
    here = held + joining * job.state_bytes + job.rows * _INDEX + job.activations()
    streamed = job.statistics() + held - away + job.activations() + job.weight_copies()
    dense = sum(n * m for n, m in zip(job.lengths, job.counts, strict=True)) / max(1, job.rows)
    whole = job.state_bytes + job.activations() + job.weight_copies()
    return {
        "torch": _Need(flop, job.workspace(), here + job.weight_copies(), 0),
        "triton": _Need(flop, job.triton_workspace(), here + job.weight_copies(folds=False), 0),
        "torch, streamed": _Need(flop + job.gates_again(), job.stream_workspace(), streamed, away),
        "reference": _Need(flop * dense, job.dense_workspace(), whole, 0),
    }
