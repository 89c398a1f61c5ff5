"""The way back through a layer's MLP, or its experts, under a linear rule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..adapters import Mlp
from ..linear_rules import linear_shares, reads_up
from ..runtime.products import accumulate, product
from ..runtime.transfer import to_device
from ..trace.record import LayerTrace, MlpTrace
from .batches import Packing
from .curves import kernel_curve
from .norms import FrozenNorm, on_device

_HELD = 12  # numbers per neuron, position and row that a chunk holds at once, about


@dataclass(frozen=True)
class MlpBack:
    """The gradients (R, A, D) that the MLPs pass to what they read, and the scores of what they add.

    ``neurons`` are (R, P, I) for each of the ``parts``, None if they were not asked for. ``constant`` (R, P) is
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

    ``parts`` are those of ``LayerTrace.mlps`` that read and write through the same norms, side by side. Products run in
    ``compute``, the rest in the dtype of the gradients. ``budget`` bounds what is held, in bytes.
    """

    mlps: tuple[Mlp, ...]
    record: LayerTrace
    parts: tuple[MlpTrace, ...]
    packing: Packing
    partial: bool
    rule: str
    compute: torch.dtype
    budget: int

    def back(self, gradients: Tensor, x: Tensor, with_neurons: bool, behind: Tensor | None = None) -> MlpBack:
        """Take gradients (R, A, D) of what the MLP adds back to what it reads, the residual stream ``x`` (A, D).

        Neurons are scored by the gradients ``behind`` (R, A, D) the layer's last MLP, where these are others.
        """
        trace, dtype = self.parts[0], gradients.dtype
        weights = self.mlps[trace.part]
        at = self.packing.at(self.partial, gradients.device)
        norm = FrozenNorm.of(weights.norm, x, dtype)
        out_scale = trace.out_scale if at is None or trace.out_scale is None else trace.out_scale[at]
        written = weights.written_transposed(gradients, out_scale).to(self.compute)
        normed = norm.read(x).to(self.compute) if self.rule != "taylor" else None
        read, neurons, driven, scored = _Sum(gradients), [], [], None
        if behind is not None:
            scored = weights.written_transposed(behind, out_scale).to(self.compute)
        for part in self.parts:
            of_neurons, of_constants = self._part(part, written, normed, read, with_neurons, scored)
            neurons.append(of_neurons)
            driven += [] if of_constants is None else [of_constants]
        constant = None
        if len(self.parts) == len(self.record.mlps):  # MLPs with several norms have no biases
            constant = self.record.mlp_constant(self.mlps, slice(0, self.packing.n_positions), dtype)
        if constant is not None:
            constant = constant if constant.ndim == 1 or at is None else constant[at]
            constant = self.packing.sum((gradients * constant).sum(-1), self.partial)
        of_driven = sum(driven[1:], driven[0]) if driven else None
        return MlpBack(norm.back(read.total), neurons if with_neurons else None, constant, of_driven)

    def _part(
        self,
        trace: MlpTrace,
        written: Tensor,
        normed: Tensor | None,
        read: _Sum,
        with_neurons: bool,
        scored: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Take gradients ``written`` (R, A, D) back through one MLP, and add them to ``read``, in front of the norm.

        ``normed`` (A, D) is what the MLP reads, None where the rule does not need it. Neurons are scored by ``scored``
        (R, A, D), if given. Returns the scores of its neurons (R, P, I), and that of what drives them by no component
        (R, P), or None.
        """
        weights, dtype = self.mlps[trace.part], read.like.dtype
        w_gate, w_down = weights.w_gate.to(self.compute), weights.w_down.to(self.compute)
        w_up = weights.w_up.to(self.compute) if reads_up(self.rule, weights) else None
        constants = weights.gate_constant(dtype), None if w_up is None else weights.up_constant(dtype)
        scores, found = [], []
        dtypes = dtype, self.compute, trace.act.dtype
        curve = None
        if weights.inner is None:  # the kernels know no factor by neuron
            curve = kernel_curve(self.rule, weights, constants, written.device, *dtypes)
        for places in self._places(trace, len(written) * len(w_gate) * dtype.itemsize * _HELD, written.device):
            if curve is not None:
                up = None if w_up is None or normed is None else product(self._read(normed, trace, places), w_up.T)
                y = product(written[:, places.at], w_down)
                of_ups, of_neurons = self._by_kernel(y, up, trace, places, curve)
                scores.append(of_neurons if scored is None else self._scores(scored, trace, places, w_down, dtype))
                back = product(y, w_gate)
                back = back if of_ups is None or w_up is None else _added(back, of_ups, w_up)
                read.add(places, _weighted(back, trace, places))
                continue
            y = product(written[:, places.at], w_down).to(dtype)  # (R, a, I)
            up = None
            if w_up is not None and normed is not None:
                up = product(self._read(normed, trace, places), w_up.T).to(dtype)
                up = up if constants[1] is None else up + constants[1]
            shares = linear_shares(self.rule, weights, trace, places.recorded, dtype, up)
            if with_neurons and scored is not None:
                scores.append(self._scores(scored, trace, places, w_down, dtype))
            elif with_neurons:
                scores.append(self.packing.sum_at(y * trace.act[places.recorded].to(dtype), places.packed))
            driven = shares.of_bias(*constants)
            if driven is not None:
                found.append(self.packing.sum_at((y * driven).sum(-1), places.packed))
            back = product((y * shares.gate).to(self.compute), w_gate)
            if shares.up is not None and w_up is not None:
                back = _added(back, (y * shares.up).to(self.compute), w_up)
            read.add(places, _weighted(back, trace, places))
        neurons = sum(scores[1:], scores[0]) if scores else self._nothing(read.like, len(w_gate))
        return neurons, sum(found[1:], found[0]) if found else None

    def _scores(self, scored: Tensor, trace: MlpTrace, places: Places, w_down: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the scores of neurons (R, P, I), given gradients (R, A, D) of what they write."""
        y = product(scored[:, places.at], w_down).to(dtype)
        return self.packing.sum_at(y * trace.act[places.recorded].to(dtype), places.packed)

    def _read(self, normed: Tensor, trace: MlpTrace, places: Places) -> Tensor:
        """Return what an MLP reads at some places, of what it reads everywhere (A, D): (a, D)."""
        return _weighted(normed[places.at], trace, places)

    def _nothing(self, like: Tensor, n_neurons: int) -> Tensor:
        return like.new_zeros(len(like), self.packing.n_prompts, n_neurons)

    def _by_kernel(
        self, y: Tensor, up: Tensor | None, trace: MlpTrace, places: Places, curve: str
    ) -> tuple[Tensor | None, Tensor]:
        """Turn gradients ``y`` (R, a, I) of what neurons write into those of their gates, in place.

        Returns the gradients of the ups, and the scores of the neurons (R, P, I).
        """
        from ..kernels.way_back import neurons_back  # needs Triton

        pieces, members = self.packing.pieces(places.packed, y.device)
        recorded = places.recorded
        if isinstance(recorded, slice):
            recorded = self.packing.range(recorded, y.device)
        with on_device(y.device):
            given = (trace.act, trace.gate, up, recorded, pieces, self.rule, curve, trace.router_weight)
            of_ups, found = neurons_back(y, *given)
        if members is None:
            return of_ups, found
        return of_ups, torch.einsum("ps,rsi->rpi", members.to(found), found)

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


class _Sum:
    """Gradients (R, A, D), zero at first; the first that are added to all positions take their place."""

    def __init__(self, like: Tensor) -> None:
        self.like, self._total = like, None

    @property
    def total(self) -> Tensor:
        return torch.zeros_like(self.like) if self._total is None else self._total

    def add(self, places: Places, back: Tensor) -> None:
        """Add (R, a, D) at some places, each of which is there once."""
        if self._total is None and back.shape == self.like.shape:
            self._total = back.to(self.like)
            return
        if self._total is None:
            self._total = torch.zeros_like(self.like)
        if isinstance(places.at, slice):
            self._total[:, places.at] += back
        else:
            self._total.index_add_(1, places.at, back.to(self._total))


def _weighted(x: Tensor, trace: MlpTrace, places: Places) -> Tensor:
    """Return x (..., a, D) times the factor of what an expert reads."""
    weight = trace.input_weight
    return x if weight is None else x * weight[places.recorded, None].to(x)


def _added(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return total (R, a, D) + a (R, a, I) @ b (I, D); ``total`` may be used up."""
    accumulate(total.view(-1, total.shape[2]), a.flatten(0, 1), b)
    return total
