"""Neurons that write something: where an activation is exactly zero, a position does without the neuron.

A model with ReLU or ReLU² has 50 to 97 % of zeros. What a neuron shares out is multiplied by its activation whatever
the rule, so that leaving it out is exact. Neighbouring positions may go together, with every neuron that any of them
needs: then fewer weights are gathered, and products are larger. :class:`Costs` decides that.

NaN is not hidden: a NaN in a state is in its gates of all neurons and stays in its row. Only a gate that alone
overflows, of a neuron that writes nothing, makes no NaN here as it would in the product with zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from ..adapters import Adapter
from ..runtime.transfer import all_to_device, to_device, to_host
from ..state.layout import Layout
from ..trace.record import MlpTrace, Trace

_LEVELS = 7  # up to 64 positions go together
_GAIN = 0.9  # of the time with all neurons, which has to be undercut by the prediction
_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.uint8)  # bits set in a byte


# -- what a trace holds ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Activity:
    """The neurons that write something at P recorded positions: ``bits`` (P, ⌈I / 8⌉) uint8 in host memory.

    ``version`` is that of the activations; None if they do not count their changes.
    """

    bits: np.ndarray
    n_neurons: int
    version: int | None

    @cached_property
    def unions(self) -> list[np.ndarray]:
        """The numbers of neurons that 1, 2, 4, ... neighbouring positions need together, (P,), (⌈P / 2⌉,), ..."""
        bits, found = self.bits, []
        while True:
            found.append(_ONES[bits].sum(1, dtype=np.int64))
            if len(bits) == 1 or len(found) == _LEVELS:
                return found
            bits = np.bitwise_or.reduceat(bits, _pairs(bits))

    def needed(self, positions: np.ndarray, multiple: int) -> np.ndarray:
        """The neurons that ``positions`` need together, and as many others as make them a ``multiple``."""
        bits = np.bitwise_or.reduce(self.bits[positions], axis=0)
        writes = np.unpackbits(bits, count=self.n_neurons, bitorder="little").astype(bool)
        needed = np.flatnonzero(writes)
        return np.concatenate([needed, np.flatnonzero(~writes)[: _padded(len(needed), multiple) - len(needed)]])


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # activations, as traces hold them -> Activity


def may_vanish(adapter: Adapter) -> bool:
    """True if the model's activations may be exactly zero: its config names a ReLU of some kind."""
    named = (value for value in vars(adapter.config).values() if isinstance(value, str))
    return any("relu" in value.lower() for value in named)


def look(adapter: Adapter, trace: Trace, first: int, end: int) -> None:
    """Look for zeros in the layers from ``first`` to ``end`` (excluded), once per trace; the device is waited for once.

    It is not for models whose activations cannot vanish.
    """
    if not may_vanish(adapter):
        return
    every = [mlp.act for layer in trace.layers[first:end] for mlp in layer.mlps]
    fresh = [act for act in every if act.numel() and act.device.type != "meta" and not _is_known(act)]
    for act, bits in zip(fresh, to_host([_packed(act) for act in fresh]), strict=True):
        _known[act] = Activity(bits.numpy(), act.shape[1], _version(act))


def _version(act: Tensor) -> int | None:
    return None if act.is_inference() else act._version


def _is_known(act: Tensor) -> bool:
    known = _known.get(act)
    return known is not None and known.version is not None and known.version == _version(act)


def _activity(act: Tensor) -> Activity | None:
    known = _known.get(act)
    return known if known is not None and known.version == _version(act) else None


def _packed(act: Tensor) -> Tensor:
    """A bit per activation that is not zero, the lowest first: (P, I) -> (P, ⌈I / 8⌉) uint8."""
    writes = functional.pad(act != 0, (0, -act.shape[1] % 8)).unflatten(1, (-1, 8))
    values = to_device(2 ** np.arange(8, dtype=np.uint8), act.device)
    return (writes * values).sum(-1, dtype=torch.uint8)


# -- which positions go together ------------------------------------------------------------------------------------


class Costs(NamedTuple):
    """The time of a group of positions, counted in the FLOP of a large product that take as long.

    gathered: to copy one number of a weight to its place among the chosen ones.
    group: to launch what a group takes.
    smallest: numbers of a product's result; with fewer a GPU is not busy, and takes the same time.
    multiple: of neurons, which a product likes.
    """

    gathered: float
    group: float
    smallest: float
    multiple: int

    @staticmethod
    def on(device: torch.device, dtype: torch.dtype) -> Costs:
        """Costs on a CPU (100 GFLOP/s, 10 GB/s), or on a GPU (600 TFLOP/s in half precision, else 50; 3 TB/s)."""
        if device.type == "cpu":
            return Costs(100.0, 2e7, 0.0, 16)
        half = dtype.itemsize == 2
        return Costs(1200.0 if half else 200.0, 3e10 if half else 3e9, 132 * 128.0**2, 64)

    def of(self, rows: np.ndarray, neurons: np.ndarray, width: int) -> np.ndarray:
        """The costs of groups with so many ``rows`` and ``neurons``; nothing without rows."""
        neurons = _padded(neurons, self.multiple)
        gate = np.maximum(rows * neurons, self.smallest) * width
        down = np.maximum(rows * width, self.smallest) * neurons
        whole = 2 * (gate + down) + 2 * self.gathered * neurons * width + self.group
        return np.where(rows > 0, whole, 0.0)


@dataclass(frozen=True, eq=False)
class Groups:
    """Segments of a state that go together: those from ``cuts[g]`` to ``cuts[g + 1]`` do the ``neurons[g]`` (u,)."""

    cuts: np.ndarray
    neurons: list[Tensor]

    def of(self, segments: slice) -> Tensor:
        """The neurons of segments that are in one group."""
        return self.neurons[self._next(segments.start) - 1]

    def end(self, segment: int) -> int:
        """The segment after the last one of a segment's group."""
        return int(self.cuts[self._next(segment)])

    def _next(self, segment: int) -> int:
        return int(np.searchsorted(self.cuts, segment, side="right"))


def make_groups(
    trace: MlpTrace, layout: Layout, width: int, max_rows: int, costs: Costs, device: torch.device
) -> Groups | None:
    """Group the segments of a state so that the MLP costs least; None if it is best to do all neurons.

    A group has at most ``max_rows`` rows, or one position.
    """
    activity = _activity(trace.act)
    if activity is None:
        return None
    sent = trace.host_positions
    recorded = layout.packed if sent is None else np.searchsorted(sent, layout.packed)
    if not len(recorded) or (np.diff(recorded) < 0).any():
        return None
    rows = np.bincount(recorded, weights=layout.counts, minlength=len(activity.bits))
    everything = 4.0 * width * activity.n_neurons * rows.sum()
    cost, begins = _cheapest(activity, rows, width, max_rows, costs)
    if cost + costs.gathered * width * activity.n_neurons > _GAIN * everything:  # W_down is transposed, too
        return None
    group = np.cumsum(begins)[recorded]
    cuts = np.concatenate([[0], np.flatnonzero(np.diff(group)) + 1, [len(recorded)]])
    parts = [recorded[first:last] for first, last in pairwise(cuts)]
    return Groups(cuts, all_to_device([activity.needed(np.unique(part), costs.multiple) for part in parts], device))


def _cheapest(
    activity: Activity, rows: np.ndarray, width: int, max_rows: int, costs: Costs
) -> tuple[float, np.ndarray]:
    """The least cost, and the positions (P,) bool at which groups begin; ``rows`` (P,) are those of each position.

    Groups are the blocks of a binary tree over the positions: a block is one group if that costs less than its halves.
    """
    position = np.arange(len(rows))
    begins = np.ones(len(rows), bool)
    best = costs.of(rows, activity.unions[0], width)
    for level, neurons in enumerate(activity.unions[1:], 1):
        rows, halves = (np.add.reduceat(x, _pairs(x)) for x in (rows, best))
        together = np.where(rows > max_rows, np.inf, costs.of(rows, neurons, width))
        best = np.minimum(together, halves)
        begins &= (together >= halves)[position >> level] | (position % 2**level == 0)
    return float(best.sum()), begins


def _pairs(x: np.ndarray) -> np.ndarray:
    return np.arange(0, len(x), 2)


def _padded(count: np.ndarray | int, multiple: int) -> np.ndarray:
    """The next multiple of ``count``, one at least: no product is empty."""
    return -(-np.maximum(count, 1) // multiple) * multiple


# -- a layer with some of its neurons ---------------------------------------------------------------------------------


class MlpTensors(NamedTuple):
    """An MLP's neurons: w_gate (I, D), w_down (D, I), act (P, I), constant (I,) of the gates.

    ``recorded`` (S,) are the rows of ``act`` that segments read.
    """

    w_gate: Tensor
    w_down: Tensor
    act: Tensor
    recorded: Tensor
    constant: Tensor | None

    def at(self, segments: slice, neurons: Tensor | None) -> MlpTensors:
        """The same for some segments alone, and for some of the ``neurons`` (u,); None: all."""
        recorded = self.recorded[segments]
        if neurons is None:
            return self._replace(recorded=recorded)
        act = self.act[recorded[:, None], neurons]
        constant = None if self.constant is None else self.constant[neurons]
        w_gate, w_down = (w.index_select(0, neurons) for w in (self.w_gate, self.w_down.T))
        return MlpTensors(w_gate, w_down.T, act, torch.arange(len(recorded), device=act.device), constant)


def transposed(w_down: Tensor) -> Tensor:
    """W_down (D, I) with the numbers of a neuron side by side, for gathering."""
    return w_down.T.contiguous().T
