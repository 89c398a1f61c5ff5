"""The rows of a way back: a gradient for every target of every read, and what they are where the model ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..readout.collect import Readout
from ..readout.targets import Directions
from ..request import Request
from ..runtime.precision import full_precision
from ..runtime.transfer import all_to_device
from .batches import Packing


@dataclass(frozen=True, eq=False)
class Reads:
    """Everything that a request reads: R rows of gradients, as many as the prompt with most has.

    ``rows`` are those of every place of the ``readout``. ``seeds`` (R, A, D) are the gradients at the read positions,
    in front of the readout; ``constants`` (R, P) is what the readout's own constants are worth, in host memory.
    """

    readout: Readout
    packing: Packing
    rows: tuple[slice, ...]
    seeds: Tensor
    constants: Tensor

    @staticmethod
    @full_precision()
    def of(request: Request, directions: Sequence[Directions] | None = None) -> Reads:
        """Resolve what a traced request reads. Errors as of :meth:`Readout.of`."""
        readout, trace = Readout.of(request, directions), request.require_trace()
        packing = Packing(trace.offsets, request.read_positions)
        vectors, widths = (
            torch.cat([d.vectors for d in readout.directions]),
            [len(d.vectors) for d in readout.directions],
        )
        packed = np.array([trace.offsets[prompt] + position for prompt, position in readout.places])
        slots, rows = np.searchsorted(packing.host_at, packed), _rows(readout, packing.n_prompts)
        every = np.concatenate([np.arange(one.start, one.stop) for one in rows])
        row, slot, at = all_to_device([every, np.repeat(slots, widths), np.repeat(packed, widths)], vectors.device)
        if readout.norm is not None:
            vectors = readout.norm.transposed(vectors, readout.norm.scale(readout.resid[at].to(vectors.dtype)))
        if readout.end is not None:
            vectors = readout.end.back(vectors, at)
        seeds = vectors.new_zeros(int(every.max()) + 1, len(packing.host_at), vectors.shape[1])
        seeds[row, slot] = vectors
        return Reads.made(readout, packing, seeds)

    @staticmethod
    def made(readout: Readout, packing: Packing, seeds: Tensor) -> Reads:
        """Return the rows of a readout whose ``seeds`` are known."""
        rows = _rows(readout, packing.n_prompts)
        constants = torch.zeros(len(seeds), packing.n_prompts, dtype=seeds.dtype, device="cpu")
        for (prompt, _), where, one in zip(readout.places, rows, readout.bias_scores, strict=True):
            constants[where, prompt] = one
        return Reads(readout, packing, rows, seeds, constants)


def _rows(readout: Readout, n_prompts: int) -> tuple[slice, ...]:
    """Return the rows of every place, behind those of earlier places of its prompt."""
    rows, used = [], [0] * n_prompts
    for (prompt, _), one in zip(readout.places, readout.directions, strict=True):
        rows.append(slice(used[prompt], used[prompt] + len(one.vectors)))
        used[prompt] = rows[-1].stop
    return tuple(rows)
