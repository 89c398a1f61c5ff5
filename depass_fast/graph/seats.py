"""The nodes that a graph keeps: those with the largest shares in the target, found with the gradients of one ledger."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapters import Adapter, Branch, Layer
from ..components.base import Entry
from ..components.outputs import LayerOutputs
from ..ledger.attention import WayThroughAttention
from ..ledger.batches import Packing
from ..ledger.pages import Pages
from ..trace.record import Trace
from .dictionaries import Dictionary, Site

HEAD, NEURON, FEATURE = "head", "neuron", "feature"


class Seat(NamedTuple):
    """A head, a neuron or a feature at one position, and its exact share in the target.

    ``part`` is the number of a neuron's MLP in the layer's record (an expert); ``index`` is the head, the neuron, or
    the place of a feature among the active ones, whose dictionary is number ``part``. ``order`` counts the places of
    the stream where nodes read, from the first one on.
    """

    kind: str
    layer: int
    part: int
    index: int
    position: int
    share: float
    order: float


@dataclass(frozen=True)
class Totals:
    """The gradients of the target at every place of the stream, by all ways that lead to it: (T, D) each."""

    adapter: Adapter
    trace: Trace
    packing: Packing
    pages: Pages
    dtype: torch.dtype
    compute: torch.dtype

    def at(self, layer: int, site: str) -> Tensor:
        return self.pages.gradients[Entry(layer, site)][0].to(self.dtype)  # pyright: ignore[reportArgumentType]

    def behind(self, index: int, layer: Layer, module: str) -> Tensor:
        """Return the gradients (T, D) of what a module of a layer adds, in front of a norm of the stream."""
        record, parallel = self.trace.layers[index], layer.parallel
        after_all = module == "mlp" or parallel
        found = self.at(index + 1, "resid_pre") if after_all else self.at(index, "resid_mid")
        branch: Branch = layer.mlp if module == "mlp" else layer.attention
        total = record.mlp_sum if module == "mlp" else record.attention_sum
        if branch.stream is None:
            return found
        return branch.stream.transposed(found, branch.stream.frozen_scale(total, self.dtype))

    def of_heads(self, index: int, layer: Layer) -> Tensor:
        """Return the gradients (T, H, d) of what the output projection reads of every head."""
        way = self.way(index, layer)
        y = way.of_heads(self.behind(index, layer, "attention")[None]).to(self.dtype)
        return y[0].unflatten(-1, (layer.attention.n_heads, -1))

    def way(self, index: int, layer: Layer) -> WayThroughAttention:
        """Return the way back through the attention of a layer, at all positions."""
        record = self.trace.layers[index].attention
        return WayThroughAttention(layer.attention, record, self.packing, False, self.compute)

    def heads(self, index: int) -> Tensor:
        """Return what the output projection reads of every head, without constants: (T, H, d)."""
        outputs = LayerOutputs(self.adapter, self.trace, index, 0, self.dtype)
        return torch.cat([part.transpose(0, 1) for _, part in outputs.mixed(outputs.values())]).to(self.dtype)


def leading(
    totals: Totals, dictionaries: Mapping[Site, Dictionary], kinds: Sequence[str], count: int, n_layers: int
) -> list[Seat]:
    """Return the ``count`` nodes with the largest shares in the target, the last ones of the model first.

    Nodes without any share are left out.
    """
    found: list[Seat] = []
    for index in range(n_layers):
        for kind, part, order, shares in _shares(totals, index, kinds):
            found += _best(kind, index, part, order, shares, count)
    for number, ((layer, site), dictionary) in enumerate(dictionaries.items()):
        shares = dictionary.numbers * (totals.at(layer, site) @ dictionary.vectors.T)
        found += _best(FEATURE, dictionary.layer, number, order_of((layer, site)), shares, count)
    best = sorted(found, key=lambda seat: -abs(seat.share))[:count]
    return sorted(best, key=lambda seat: (-seat.order, -seat.position, seat.kind, seat.part, seat.index))


def _shares(totals: Totals, index: int, kinds: Sequence[str]) -> Iterator[tuple[str, int, float, Tensor]]:
    """Yield the shares (T, M) of all heads of a layer, and those of the neurons of each of its MLPs."""
    layer, record = totals.adapter.layer(index), totals.trace.layers[index]
    if "heads" in kinds and layer.attention is not None:
        yield HEAD, 0, 2.0 * index, (totals.of_heads(index, layer) * totals.heads(index)).sum(-1)
    if "neurons" in kinds and layer.mlps:
        scale = record.mlp.out_scale
        written = layer.mlp.written_transposed(totals.behind(index, layer, "mlp"), scale).to(totals.compute)
        for number, part in enumerate(record.mlps):
            weights = layer.mlps[part.part]
            y = written if part.positions is None else written[part.positions]
            shares = (y @ weights.w_down.to(totals.compute)).to(totals.dtype) * part.act.to(totals.dtype)
            yield (
                NEURON,
                number,
                read_by_mlp(index, layer.parallel),
                part_everywhere(shares, part.positions, len(written)),
            )


def order_of(site: Site) -> float:
    """Return the order of a place of the stream where a dictionary reads."""
    return 2 * site[0] + (site[1] == "resid_mid") - 0.5


def read_by_mlp(index: int, parallel: bool) -> float:
    """Return the order of the place where the MLP of a layer reads; attention's is twice the layer."""
    return 2 * index - 0.25 if parallel else 2 * index + 1.0


def part_everywhere(values: Tensor, positions: Tensor | None, n: int) -> Tensor:
    """Return values (P, M) recorded at some positions as those at all, (n, M); zero elsewhere."""
    if positions is None:
        return values
    return values.new_zeros(n, values.shape[1]).index_copy_(0, positions, values)


def _best(kind: str, layer: int, part: int, order: float, shares: Tensor, count: int) -> list[Seat]:
    """Return the nodes with the largest of the shares (T, M)."""
    flat = shares.flatten()
    top = flat.abs().topk(min(count, len(flat))).indices
    values, places = flat[top].tolist(), top.tolist()
    width = shares.shape[1]
    seats = (
        Seat(kind, layer, part, place % width, place // width, value, order)
        for value, place in zip(values, places, strict=True)
    )
    return [seat for seat in seats if seat.share]
