"""An edge of a graph, divided: by the heads that it passes, and into a head by the keys where that reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..adapters import Layer, Norm
from ..ledger.attention import WayThroughAttention
from ..ledger.norms import FrozenNorm
from ..runtime.precision import full_precision
from .between import Walk
from .model import GraphModel
from .seats import HEAD, NEURON, Seat

if TYPE_CHECKING:
    from .record import DirectShares, Node

DIRECT = "direct"


@torch.no_grad()
@full_precision()
def by_head(graph: DirectShares, source: Node, target: Node) -> list[tuple[str, float]]:
    """Return the shares of an edge by the first head that it passes behind its source. Errors of ``Graph.divide``."""
    model, row = _model(graph), _row(graph, target)
    column = _column(graph, model, source)
    walk = _ByHead(model, row, None if source.kind == "token" else model.seat(source.id), source.position or 0)
    weight = float(walk.walked().shares[0, column])
    heads = [(f"L{layer}H{head}", share) for (layer, head), share in walk.found.items() if share]
    return [(DIRECT, weight - sum(share for _, share in heads)), *sorted(heads, key=lambda one: -abs(one[1]))]


@torch.no_grad()
@full_precision()
def by_key(graph: DirectShares, source: Node, target: Node) -> list[tuple[str, float]]:
    """Return the shares of an edge into a head by the positions where the head reads. Errors of ``Graph.divide``."""
    if target.kind != HEAD:
        raise ValueError(f"by: 'key' is for edges into a head, and {target.id!r} is none.")
    model = _model(graph)
    column = _column(graph, model, source)
    shares = _ByKey(model, _row(graph, target)).walked().shares[:, column]
    labels = [place.label for place in graph.token_places]
    return [(label, float(share)) for label, share in zip(labels, shares, strict=True) if share]


def _model(graph: DirectShares) -> GraphModel:
    if graph.model is None:
        raise ValueError("graph: it holds no model to divide edges by; make it by dp.graph(...).")
    graph.model.check()
    return graph.model


def _row(graph: DirectShares, target: Node) -> int:
    """Return the row of a node's way back. ValueError for one that nothing comes into."""
    if target.activation is None:
        raise ValueError(f"target: no edge comes into {target.id!r}.")
    return 0 if target.kind == "target" else 1 + _model(graph).seats[target.id]


def _column(graph: DirectShares, model: GraphModel, source: Node) -> int:
    if source.kind == "token":
        return source.position or 0
    if source.id not in model.seats:
        raise ValueError(f"source: an edge from {source.id!r} is a sum of many, and is not divided.")
    return len(graph.tokens) + model.seats[source.id]


class _ByHead(Walk):
    """One row's way back; ``found`` are the shares of every head in what a source gives by the residual stream."""

    def __init__(self, model: GraphModel, row: int, seat: Seat | None, position: int) -> None:
        super().__init__(model.ways, range(row, row + 1))
        self.found: dict[tuple[int, int], float] = {}
        self._carried, self._position = _carried(model, seat, position), position
        self._own = model.ways.seats[row - 1] if row else None

    def _of_values(self, index: int, layer: Layer, way: WayThroughAttention, y: Tensor) -> Tensor:
        x = self._carried.get(index)
        own = self._own
        is_own = own is not None and own.kind == HEAD and own.layer == index  # it reads here by itself
        if x is None or is_own:
            return super()._of_values(index, layer, way, y)
        stream = torch.zeros_like(way.trace.resid, dtype=y.dtype)
        stream[self._position] = x.to(stream)
        norm = FrozenNorm.of(layer.attention.norm, way.trace.resid, self.back.dtype)
        of_values, heads = way.through_heads(y, way.values(norm.read(stream), self.back.dtype))
        assert heads is not None  # values were given
        self.found |= {(index, head): share for head, share in enumerate(heads[0, 0].tolist())}
        return of_values


class _ByKey(Walk):
    """The way back of a head, in as many rows as there are keys: each has what the head reads at one of them."""

    def __init__(self, model: GraphModel, row: int) -> None:
        super().__init__(model.ways, range(row, row + 1))
        self.back, self.shares = (x.expand(self.tokens, *x.shape[1:]).clone() for x in (self.back, self.shares))
        self._seat = model.ways.seats[row - 1]

    def _of_values(self, index: int, layer: Layer, way: WayThroughAttention, y: Tensor) -> Tensor:
        found = super()._of_values(index, layer, way, y)
        if index != self._seat.layer:
            return found
        self.active = self.tokens
        return found * torch.eye(self.tokens, dtype=found.dtype, device=found.device)[..., None]


def _carried(model: GraphModel, seat: Seat | None, position: int) -> dict[int, Tensor]:
    """Return what a node's output is in the stream where the attention of each layer behind it reads: (D,) by layer."""
    adapter, trace, ways = model.adapter, model.trace, model.ways
    x = trace.layers[0].resid_pre[position].to(ways.totals.dtype) if seat is None else model.written(seat)
    after = -1.0 if seat is None else seat.order if seat.kind != NEURON else 2 * seat.layer + 1.0
    found: dict[int, Tensor] = {}
    for index in range(0 if seat is None else seat.layer, adapter.n_layers):
        layer, record, at = adapter.layer(index), trace.layers[index], slice(position, position + 1)
        if 2 * index > after:
            x = _past_dictionary(model, (index, "resid_pre"), seat, x, position)
            found[index] = x
        if (
            layer.attention is not None
            and not layer.parallel
            and layer.attention.stream is not None
            and 2 * index >= after
        ):
            x = _behind_stream(layer.attention.stream, record.attention_sum, x, at)
        if 2 * index + 0.5 >= after:
            x = _past_dictionary(model, (index, "resid_mid"), seat, x, position)
        if layer.mlps and layer.mlp.stream is not None and 2 * index + 1 >= after:
            x = _behind_stream(layer.mlp.stream, record.mlp_sum, x, at)
    return found


def _behind_stream(norm: Norm, total: Tensor | None, x: Tensor, at: slice) -> Tensor:
    """Return a vector (D,) at one position behind a norm of the stream, frozen at ``total`` (T, D)."""
    return norm.apply(x[None], norm.frozen_scale(None if total is None else total[at], x.dtype))[0]


def _past_dictionary(model: GraphModel, site: tuple[int, str], seat: Seat | None, x: Tensor, position: int) -> Tensor:
    """Return what of a vector (D,) at a position does not pass the features of a place that are nodes."""
    ways = model.ways
    dictionary = ways.dictionaries.get(site)
    if dictionary is None:
        return x
    number = list(ways.dictionaries).index(site)
    kept = ways.features_of(number)
    if not kept or (seat is not None and seat.kind == "feature" and seat.part == number):
        return x
    activations, gradients = ways.read_by(number, dictionary, kept)
    out = x.clone()
    for place, one in enumerate(ways.seats[i] for i in kept):
        if one.position == position:
            amount = dictionary.numbers[position, one.index] / activations[place] * (gradients[place].to(x) @ x)
            out -= amount * dictionary.vectors[one.index]
    return out
