"""The shares of heads and neurons position by position: where they write, where heads read, and what neurons read.

A ledger's gradients say what any vector at any position is worth. A head's score is a sum over the positions where it
writes, and as well over those whose values it carries. A neuron's score at a position is shared out over everything
that wrote to what it reads there: under a linear rule its activation is a fixed linear function of that (DESIGN.md
section 8).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from ..adapters import Adapter
from ..components.model import Heads, Neurons
from ..components.outputs import LayerOutputs
from ..linear_rules import linear_shares, reads_up
from ..request import Request, wide_dtype
from ..runtime.precision import full_precision
from ..trace.first import first_positions
from ..trace.record import MlpTrace, Trace
from .attention import WayThroughAttention
from .batches import Packing
from .norms import FrozenNorm
from .pages import Pages

Chosen: TypeAlias = Sequence[Sequence[tuple[int, str]]]  # neurons, by layer and name, for each row


@dataclass(frozen=True)
class LayerPlaces:
    """One layer's shares in R rows at N positions, in host memory; None where the layer has no such part.

    heads (R, N, H): at the position where the head writes; sources (R, N, H): at that whose values it carries.
    neurons (R, N, I), and the neurons' ``names``.
    """

    layer: int
    heads: Tensor | None
    sources: Tensor | None
    neurons: Tensor | None
    names: Sequence[str]


@dataclass
class Reading:
    """A neuron of row ``row``, at the ``position`` where its share is largest, and what wrote what it reads there.

    ``writers`` are (label, share): the token, heads and MLPs of earlier layers. With `bias`, what constants drive, they
    sum to ``share``.
    """

    row: int
    layer: int
    name: str
    position: int
    share: float
    writers: list[tuple[str, float]] = field(default_factory=list)

    @property
    def bias(self) -> float:
        return self.share - sum(share for _, share in self.writers)


class _Reads:
    """The readings that are under way: a vector for each, what a vector at its position is worth to its share."""

    def __init__(self) -> None:
        self.readings: list[Reading] = []
        self.vectors: list[Tensor] = []

    def add(self, reading: Reading, vector: Tensor) -> None:
        self.readings.append(reading)
        self.vectors.append(vector)

    def write(self, names: Sequence[str], states: Tensor) -> None:
        """Note what writers (N, M, D) give to every reading."""
        for reading, vector in zip(self.readings, self.vectors, strict=True):
            found = states[reading.position] @ vector.to(states)
            reading.writers += zip(names, found.tolist(), strict=True)

    def back_through(self, outputs: LayerOutputs, module: str) -> None:
        """Take the vectors back through a norm of the stream behind a module, where there is one."""
        for number, (reading, vector) in enumerate(zip(self.readings, self.vectors, strict=True)):
            self.vectors[number] = outputs.back_through_stream(vector, module, reading.position)


@full_precision()
@torch.no_grad()
def places_of(request: Request, pages: Pages, trace: Trace, chosen: Chosen) -> tuple[list[LayerPlaces], list[Reading]]:
    """Return every layer's shares by position of a request of one prompt, and the readings of the ``chosen`` neurons.

    ``trace`` is the one that the pages were made from, with its activations. ``chosen`` are (layer, name) for each row.
    """
    rule = request.run.allocation.linear_rule
    assert rule is not None and trace.n_prompts == 1
    trace = first_positions(trace, request.carried)
    way = _Way(request.adapter, trace, pages, rule, wide_dtype(request))
    found = list(way.layers(request.end, chosen))
    return found[::-1], way.reads.readings


@torch.no_grad()
def shares_of(
    request: Request, pages: Pages, trace: Trace, kind: Heads | Neurons
) -> Iterator[tuple[int, Tensor | None]]:
    """Yield the layers of some heads or neurons with their shares by where they write: (R, N, H), or (R, N, I).

    None where no position was sent to any expert. ``request`` and ``trace`` as of :func:`places_of`.
    """
    rule = request.run.allocation.linear_rule
    assert rule is not None and trace.n_prompts == 1
    way = _Way(request.adapter, first_positions(trace, request.carried), pages, rule, wide_dtype(request))
    for one in kind.each(request.adapter):
        layer = one.resolve(request.adapter)
        with full_precision():
            shares = way.shares(layer, isinstance(one, Heads))
        yield layer, shares


class _Way:
    """A way through the layers, from the last one to the first."""

    def __init__(self, adapter: Adapter, trace: Trace, pages: Pages, rule: str, dtype: torch.dtype) -> None:
        self._adapter, self._trace, self._pages, self._rule, self._dtype = adapter, trace, pages, rule, dtype
        self._packing, self.reads = Packing(trace.offsets, [range(trace.length(0))]), _Reads()

    def layers(self, end: int, chosen: Chosen) -> Iterator[LayerPlaces]:
        """Go through the layers below ``end``."""
        adapter = self._adapter
        for layer in reversed(range(end)):
            outputs = LayerOutputs(adapter, self._trace, layer, 0, self._dtype)
            heads = sources = neurons = states = None
            names: Sequence[str] = ()
            if adapter.has_mlp(layer):
                self.reads.write([f"L{layer}.mlp"], outputs.whole("mlp")[:, None])
                self.reads.back_through(outputs, "mlp")
                names, neurons = self._neurons(layer, outputs)
            wanted = [(row, name) for row, some in enumerate(chosen) for at, name in some if at == layer]
            if adapter.has_attention(layer):
                states, heads, before = self._heads(layer, outputs)
                sources = self._sources(outputs, before)
            begun = [] if neurons is None else self._begun(layer, outputs, wanted, names, neurons)
            if not adapter.is_parallel:
                self._join(begun)
            if states is not None:
                self.reads.write([f"L{layer}H{h}" for h in range(states.shape[1])], states)
                self.reads.back_through(outputs, "attention")
            if adapter.is_parallel:
                self._join(begun)
            heads, sources, neurons = (None if x is None else x.cpu() for x in (heads, sources, neurons))
            yield LayerPlaces(layer, heads, sources, neurons, names)
        for reading, vector in zip(self.reads.readings, self.reads.vectors, strict=True):
            entered = self._trace.resid(0)[reading.position].to(vector)
            reading.writers.append(("token", float(entered @ vector)))

    def shares(self, layer: int, of_heads: bool) -> Tensor | None:
        """Return the shares of a layer's heads or neurons, by where they write."""
        outputs = LayerOutputs(self._adapter, self._trace, layer, 0, self._dtype)
        return self._heads(layer, outputs)[1] if of_heads else self._neurons(layer, outputs)[1]

    def _join(self, begun: Sequence[tuple[Reading, Tensor]]) -> None:
        for reading, vector in begun:
            self.reads.add(reading, vector)

    def _heads(self, layer: int, outputs: LayerOutputs) -> tuple[Tensor, Tensor, Tensor]:
        """Return the heads' outputs (N, H, D), their shares by where they write, and what they are worth: (R, N, D)."""
        gradients = self._pages.gradients[Heads(layer).entry(self._adapter)]
        values = outputs.values()
        states = values.new_empty(len(values), outputs.attention.n_heads, gradients.shape[2])
        outputs.attend(values, states)
        states, here = outputs.entering(states, "attention"), gradients.to(values.device)
        shares = torch.einsum("nhd,rnd->rnh", states, here.to(states))
        return states, shares, outputs.back_through_stream(here, "attention")

    def _sources(self, outputs: LayerOutputs, before: Tensor) -> Tensor:
        """Return the heads' shares by the positions whose values they carry: (R, N, H)."""
        record = outputs.record.attention
        assert record is not None
        way = WayThroughAttention(outputs.attention, record, self._packing, False, self._dtype)
        return way.sources(before, record.resid.to(before))

    def _neurons(self, layer: int, outputs: LayerOutputs) -> tuple[Sequence[str], Tensor | None]:
        """Return the neurons' names, and their shares (R, N, I); None where no position was sent to any expert."""
        if not outputs.reached():
            return (), None
        names, products = outputs.neurons(f"L{layer}")
        gradients, numbers = self._gradients_of_mlp(layer), products.coefficients
        assert numbers is not None
        return names, (gradients.to(numbers.device) @ products.vectors.to(gradients).T) * numbers.to(gradients)

    def _gradients_of_mlp(self, layer: int) -> Tensor:
        return self._pages.gradients[Neurons(layer).entry(self._adapter)]

    def _begun(
        self,
        layer: int,
        outputs: LayerOutputs,
        wanted: Sequence[tuple[int, str]],
        names: Sequence[str],
        neurons: Tensor,
    ) -> list[tuple[Reading, Tensor]]:
        """Return the readings of some neurons of a layer, with what a vector in front of its MLP is worth to each."""
        place, found = {name: i for i, name in enumerate(names)}, []
        for row, name in wanted:
            shares = neurons[row, :, place[name]]
            position = int(shares.abs().argmax())
            reading = Reading(row, layer, name, position, float(shares[position]))
            vector = self._vector(layer, outputs, place[name], row, position)
            found.append((reading, vector))
        return found

    def _vector(self, layer: int, outputs: LayerOutputs, place: int, row: int, position: int) -> Tensor:
        """Return what a vector in front of the MLP, at a position, is worth to one neuron's share: (D,)."""
        part, neuron = _part_of(outputs, place)
        weights, at = outputs.mlps[part.part], slice(position, position + 1)
        gradient = self._gradients_of_mlp(layer)[row : row + 1, at]
        gradient = outputs.back_through_stream(gradient[0, 0].to(part.act.device), "mlp", position)
        x = part.resid[at].to(gradient)
        norm = FrozenNorm.of(weights.norm, x, gradient.dtype)
        scale = None if part.out_scale is None else part.out_scale[at]
        written = weights.written_transposed(gradient[None], scale)[0] @ weights.w_down[:, neuron].to(gradient)
        up, recorded = None, part.rows(torch.tensor([position], device=part.act.device))
        weight = 1.0 if part.input_weight is None else part.input_weight[recorded, None].to(gradient)
        if reads_up(self._rule, weights):
            up, constant = (norm.read(x) * weight) @ weights.w_up.to(gradient).T, weights.up_constant(gradient.dtype)
            up = up if constant is None else up + constant
        shares = linear_shares(self._rule, weights, part, recorded, gradient.dtype, up)
        read = shares.gate[0, neuron] * weights.w_gate[neuron].to(gradient)
        if shares.up is not None:
            read = read + shares.up[0, neuron] * weights.w_up[neuron].to(gradient)
        return norm.back((read * written * weight).view(1, 1, -1))[0, 0]


def _part_of(outputs: LayerOutputs, place: int) -> tuple[MlpTrace, int]:
    """Return the MLP, or the expert, that the neuron at a place of :meth:`LayerOutputs.neurons` is of, and its row."""
    for part in (outputs.record.mlps[index] for index in outputs.reached()):
        if place < part.act.shape[1]:
            return part, place
        place -= part.act.shape[1]
    raise IndexError(place)
