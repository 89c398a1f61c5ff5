"""The sizes of a layer that a recurrence mixes, and what the model's own code of it holds in a forward pass.

The numbers per position are those of transformers' code without kernels, measured where they are not counted:
``python -m bench.memory.plan --only today`` compares.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch

from ..adapters import Adapter
from ..trace.mixing import LONGEST_MATRIX, LOOKED, LOOKED_CUDA
from ..trace.scan import SCANNED, SCANNED_CUDA, SCANS, are_channels, scanned_numbers
from ..trace.size import recurrence_of

_known: WeakKeyDictionary = WeakKeyDictionary()
_CHUNKS, _CHUNK = ("chunk_size", "mamba_chunk_size"), 64  # positions of a chunk, by its names in configs, else
_OF_VALUES, _OF_KEYS = 6, 3  # times that numbers as wide as all heads' values, and as their keys, are held
_DECAYS, _MAPS, _STATES = 4, 6, 3  # times that those of a chunk's positions are, and of every position's states
_LOGITS = 4  # times that the model's own logits are, where these have a bias by distance
_PROBABILITIES = 3  # times that probabilities beside a recurrence are


@dataclass(frozen=True)
class MixerSize:
    """A recurrence of ``heads``, of so many channels of values and of keys, and softmax heads ``looking`` beside it.

    ``numbers`` in float32 are what the model's own code holds for every position, of which there are multiples of
    ``chunk``. Of ``logits`` heads it holds all logits. ``differ``: a head's probabilities are those of two softmaxes.
    """

    heads: int
    values: int
    keys: int
    by_channel: bool
    looking: int
    numbers: int
    chunk: int
    logits: int = 0
    differ: bool = False

    @staticmethod
    def of(adapter: Adapter, index: int) -> MixerSize | None:
        """Return the size of layer ``index``; None where no recurrence mixes its positions."""
        if not adapter.has_attention(index) or adapter.kind(index).mixer is None:
            return None
        weights, sides, (given, _) = adapter.attention(index), adapter.sides(index), recurrence_of(adapter, index)
        if given.decay is None:
            numbers, logits = 3 * weights.o.shape[1] + 2 * weights.v.shape[0], weights.n_heads
            relative, differ = given.relative is not None, given.softmax is not None and given.softmax.minus is not None
            return MixerSize(0, 0, 0, False, logits, numbers, 1, logits * relative, differ)
        heads, keys, values = given.decay.shape[1], given.k.shape[2], (weights if sides is None else sides[1]).head_dim
        by_channel, numbers = given.rates is not None or given.decay.shape[2] > 1, _OF_VALUES * heads * values
        chunk = next((getattr(adapter.config, name) for name in _CHUNKS if hasattr(adapter.config, name)), _CHUNK)
        if given.rates is not None:  # a state for every channel and position (Mamba-1)
            numbers, chunk = numbers + (_OF_KEYS + _STATES * keys) * heads, 1
        elif given.corrects:
            chunk, numbers = _CHUNK, numbers + _OF_KEYS * heads * keys + _DECAYS * heads * _CHUNK
            numbers += _STATES * heads * _CHUNK * keys * by_channel
        elif given.skip is not None:  # Mamba-2: all chunks' decays, products and maps at once
            numbers = heads * (_MAPS * chunk + values + keys)
        else:
            numbers += _OF_KEYS * heads * keys
            numbers += 0 if given.divisor is None else 2 * numbers  # mLSTM, which joins its chunks and the rest of them
        looking = 0 if sides is None else sides[0].n_heads
        return MixerSize(heads, values, keys, by_channel, looking, numbers, chunk)

    def forward(self, together: int, longest: int, on_cpu: bool) -> int:
        """Return the bytes beside the trace while so many positions pass the layer ``together``."""
        own = self.numbers * -(-together // self.chunk) * self.chunk + _LOGITS * self.logits * together**2
        return torch.float32.itemsize * max(own, self.mixed(longest, on_cpu))

    def mixed(self, positions: int, on_cpu: bool) -> int:
        """Return the numbers that are held while one prompt's positions are mixed by the frozen recurrence."""
        looked = self.looking * positions**2
        if positions > LONGEST_MATRIX:
            looked = min(looked, LOOKED if on_cpu else LOOKED_CUDA)
        return _PROBABILITIES * (1 + self.differ) * looked + self.scanned(on_cpu)

    def scanned(self, on_cpu: bool) -> int:
        """Return the numbers of the heads that are run over at once."""
        by_channel = self.by_channel or are_channels(self.heads, self.values, on_cpu)
        each = scanned_numbers(self.values, self.keys, by_channel)
        return SCANS * min(self.heads * each, SCANNED if on_cpu else SCANNED_CUDA)


def mixer_sizes(adapter: Adapter) -> list[MixerSize | None]:
    """Return the sizes of all layers' recurrences, looked up once per model."""
    if adapter.model not in _known:
        _known[adapter.model] = [MixerSize.of(adapter, index) for index in range(adapter.n_layers)]
    return _known[adapter.model]
