"""The model behind a graph: what is needed to divide its edges, and to run the model again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..adapters import Adapter
from ..request import Request
from ..trace.record import Trace
from .between import Ways
from .seats import FEATURE, HEAD, Seat


@dataclass(frozen=True, eq=False)
class GraphModel:
    """A traced request, its ways back, and the seats by the ids of their nodes.

    ``runs`` keeps, by what was held, the target of the unchanged model and the scales of its norms.
    """

    request: Request
    ways: Ways
    seats: Mapping[str, int]
    runs: dict[tuple[str, ...], tuple[float, dict[int, Tensor]]] = field(default_factory=dict)

    @property
    def adapter(self) -> Adapter:
        return self.request.adapter

    @property
    def trace(self) -> Trace:
        return self.request.require_trace()

    def check(self) -> None:
        """Raise ValueError if the model's weights have changed since the graph was made."""
        try:
            self.trace.source.check(self.adapter.model)
        except ValueError as error:
            raise ValueError("graph: the model's weights have changed since it was made; make it again.") from error

    def seat(self, name: str) -> Seat:
        return self.ways.seats[self.seats[name]]

    def before_output(self, seat: Seat) -> Tensor:
        """Return what a head gives to the output projection: (d,)."""
        return self.ways.heads(seat.layer)[seat.position, seat.index]

    def written(self, seat: Seat) -> Tensor:
        """Return what a node adds to the residual stream, in front of a norm of the stream: (D,)."""
        layer, record = self.adapter.layer(seat.layer), self.trace.layers[seat.layer]
        if seat.kind == FEATURE:
            dictionary = list(self.ways.dictionaries.values())[seat.part]
            return dictionary.numbers[seat.position, seat.index] * dictionary.vectors[seat.index]
        at = slice(seat.position, seat.position + 1)
        if seat.kind == HEAD:
            raw, scale = self.raw_head(seat), record.attention.out_scale
            return layer.attention.written(raw[None], None if scale is None else scale[at])[0]
        raw, scale = self.raw(seat), record.mlp.out_scale
        return layer.mlp.written(raw[None], None if scale is None else scale[at])[0]

    def raw_head(self, seat: Seat) -> Tensor:
        """Return what a head gives to its attention's output: (D,)."""
        attention, dtype = self.adapter.attention(seat.layer), self.ways.totals.dtype
        weight = attention.w_o[:, seat.index * attention.head_dim : (seat.index + 1) * attention.head_dim]
        return weight.to(dtype) @ self.before_output(seat).to(dtype)

    def raw(self, seat: Seat) -> Tensor:
        """Return what a neuron gives to its MLP's output: its activation times its row of W_down, (D,)."""
        part = self.trace.layers[seat.layer].mlps[seat.part]
        weights = self.adapter.layer(seat.layer).mlps[part.part]
        row = (
            seat.position if part.positions is None else part.rows(torch.tensor([seat.position]).to(part.positions))[0]
        )
        dtype = self.ways.totals.dtype
        return part.act[row, seat.index].to(dtype) * weights.w_down[:, seat.index].to(dtype)
