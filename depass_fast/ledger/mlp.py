"""The way back through a layer's MLP, or its experts, under a linear rule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..adapters import Mlp
from ..linear_rules import linear_shares
from ..runtime.transfer import to_device
from ..trace.record import LayerTrace, MlpTrace
from .batches import Packing

_HELD = 12  # numbers per neuron, position and row that a chunk holds at once, about


@dataclass(frozen=True)
class MlpBack:
    """The gradients (R, A, D) that the MLP passes to what it reads, and the scores of what it adds.

    ``neurons`` are (R, P, I) for each of ``LayerTrace.mlps``, None if they were not asked for. ``constant`` (R, P) is
    the score of the constants in the output, ``driven`` that of the constants in front of the activation, which are
    part of what neurons write; each None where there is none.
    """

    gradients: Tensor
    neurons: list[Tensor] | None
    constant: Tensor | None
    driven: Tensor | None


@dataclass(frozen=True)
class WayThroughMlp:
    """One layer's MLPs under a linear ``rule``; with ``partial``, gradients arrive at the read positions alone.

    Products run in ``compute``, the rest in the dtype of the gradients. ``budget`` bounds what is held, in bytes.
    """

    mlps: tuple[Mlp, ...]
    record: LayerTrace
    packing: Packing
    partial: bool
    rule: str
    compute: torch.dtype
    budget: int

    def back(self, gradients: Tensor, with_neurons: bool) -> MlpBack:
        """Take gradients (R, A, D) of what the MLP adds back to what it reads."""
        weights, trace, dtype = self.mlps[self.record.mlp.part], self.record.mlp, gradients.dtype
        at = self.packing.at(self.partial, gradients.device)
        out_scale = trace.out_scale if at is None or trace.out_scale is None else trace.out_scale[at]
        written = weights.written_transposed(gradients, out_scale)
        read, neurons, driven = torch.zeros_like(gradients), [], []
        for part in self.record.mlps:
            of_neurons, of_constants = self._part(part, written, read, with_neurons)
            neurons.append(of_neurons)
            driven += [] if of_constants is None else [of_constants]
        if weights.norm is not None:
            resid = trace.resid if at is None else trace.resid[at]
            read = weights.norm.transposed(read, weights.norm.scale(resid.to(dtype)))
        constant = self.record.mlp_constant(self.mlps, slice(0, self.packing.n_positions), dtype)
        if constant is not None:
            constant = constant if constant.ndim == 1 or at is None else constant[at]
            constant = self.packing.sum((gradients * constant).sum(-1), self.partial)
        of_driven = sum(driven[1:], driven[0]) if driven else None
        return MlpBack(read, neurons if with_neurons else None, constant, of_driven)

    def _part(self, trace: MlpTrace, written: Tensor, read: Tensor, with_neurons: bool) -> tuple[Tensor, Tensor | None]:
        """Take gradients ``written`` (R, A, D) back through one MLP, and add them to ``read``, in front of the norm.

        Returns the scores of its neurons (R, P, I), and that of what drives them by no component (R, P), or None.
        """
        weights, dtype = self.mlps[trace.part], written.dtype
        w_gate, w_down = weights.w_gate.to(self.compute), weights.w_down.to(self.compute)
        n_neurons = len(w_gate)
        scores = written.new_zeros(len(written), self.packing.n_prompts, n_neurons if with_neurons else 0)
        constant = None
        gate_constant, up_constant = weights.gate_constant(dtype), weights.up_constant(dtype)
        for places in self._places(trace, len(written) * n_neurons * dtype.itemsize * _HELD, written.device):
            y = (places.of(written).to(self.compute) @ w_down).to(dtype)  # (R, a, I)
            shares = linear_shares(self.rule, weights, trace, places.recorded, dtype, product=self.compute)
            if with_neurons:
                scores += self.packing.sum_at(y * trace.act[places.recorded].to(dtype), places.packed)
            driven = shares.of_bias(gate_constant, None if shares.up is None else up_constant)
            if driven is not None:
                more = self.packing.sum_at((y * driven).sum(-1), places.packed)
                constant = more if constant is None else constant + more
            back = ((y * shares.gate).to(self.compute) @ w_gate).to(dtype)
            if shares.up is not None:
                back += ((y * shares.up).to(self.compute) @ weights.w_up.to(self.compute)).to(dtype)
            places.add_to(read, back)
        return scores, constant

    def _places(self, trace: MlpTrace, row: int, device: torch.device) -> Iterator[Places]:
        """Yield the positions where gradients arrive and that were sent to an MLP, as many as there is room for.

        ``row`` are the bytes of one.
        """
        packed = self.packing.host_at if self.partial else np.arange(self.packing.n_positions)
        sent, slots = trace.host_positions, None
        if sent is not None:
            slots = np.flatnonzero(np.isin(packed, sent))
            packed = packed[slots]
        size = max(1, self.budget // max(1, row))
        for first in range(0, len(packed), size):
            here = packed[first : first + size]
            recorded = here if sent is None else np.searchsorted(sent, here)
            is_range = len(recorded) == recorded[-1] - recorded[0] + 1
            rows = slice(int(recorded[0]), int(recorded[-1]) + 1) if is_range else to_device(recorded, device)
            at = slice(first, first + len(here)) if slots is None else to_device(slots[first : first + size], device)
            yield Places(here, rows, at)


@dataclass(frozen=True)
class Places:
    """Some positions of one MLP: ``packed`` (a,) in host memory, the rows of its record, and those of the gradients."""

    packed: np.ndarray
    recorded: Tensor | slice
    at: Tensor | slice

    def of(self, gradients: Tensor) -> Tensor:
        """Return gradients (R, A, D) at these places: (R, a, D)."""
        return gradients[:, self.at]

    def add_to(self, gradients: Tensor, back: Tensor) -> None:
        """Add (R, a, D) to gradients (R, A, D) at these places, each of which is there once."""
        if isinstance(self.at, slice):
            gradients[:, self.at] += back
        else:
            gradients.index_add_(1, self.at, back)
