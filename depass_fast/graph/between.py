"""The direct shares between the nodes of a graph: one way back for each of them, many at once.

A gradient starts where a node reads. It goes back through the residual stream and through frozen attention, and ends at
every neuron and at every head and feature that is a node: their outputs take their shares there. docs/graph.md has the
formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..adapters import Branch, Layer
from ..components.outputs import LayerOutputs
from ..ledger.attention import WayThroughAttention
from ..ledger.norms import FrozenNorm
from ..ledger.reads import Reads
from ..linear_rules import linear_shares, reads_up
from ..runtime.precision import full_precision
from .dictionaries import Dictionary, Site
from .seats import FEATURE, HEAD, NEURON, Seat, Totals, order_of, part_everywhere, read_by_mlp


@dataclass
class Direct:
    """The direct shares (R, S) of all sources in R nodes: the target, then those of the seats, in their order.

    The sources are T tokens, all seats, what is left of the neurons (`others`), and constants (`bias`).
    ``activations`` (R,) is what each row sums to, ``sizes`` (R,) the sum of the sizes of the products that these are.
    """

    shares: Tensor
    activations: Tensor
    sizes: Tensor


@dataclass
class Ways:
    """The ways back from the target (row 0) and from every seat (row 1 + its number)."""

    totals: Totals
    reads: Reads
    dictionaries: dict[Site, Dictionary]
    seats: Sequence[Seat]
    rule: str
    _pruned: dict[int, Tensor] = field(default_factory=dict)
    _heads: dict[int, Tensor] = field(default_factory=dict)
    _features: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @full_precision()
    def all(self, budget: int) -> Direct:
        """Return the direct shares in all nodes. What is held at once is bounded by ``budget`` bytes, or by one row."""
        totals, count = self.totals, 1 + len(self.seats)
        x = totals.trace.resid_final
        widths = [totals.adapter.attention(i).o.shape[1] for i in self._layers() if totals.adapter.has_attention(i)]
        row = len(x) * (4 * x.shape[1] + 4 * max(widths, default=0)) * totals.dtype.itemsize
        size = max(1, budget // row)
        parts = [Walk(self, range(first, min(first + size, count))).walked() for first in range(0, count, size)]
        logit = self.reads.readout.logits[0].to(totals.dtype).view(-1)[:1]
        parts[0].activations[0] = logit.to(parts[0].activations)[0]
        parts[0].shares[0, -1] += self.reads.constants[0, 0].to(parts[0].shares)
        parts[0].sizes[0] = self.reads.readout.sizes[0].view(-1)[0]
        return Direct(*(torch.cat([getattr(part, name) for part in parts]) for name in Direct.__dataclass_fields__))

    def _layers(self) -> range:
        return range(self.totals.adapter.n_layers)

    def rows_at(self, order: float, rows: range) -> list[int]:
        """Return those of the ``rows`` whose nodes read at the place of this order."""
        return [row for row in rows if row and self.seats[row - 1].order == order]

    def of(self, kind: str, layer: int) -> list[int]:
        """Return the numbers of the seats of one kind and layer."""
        return [i for i, seat in enumerate(self.seats) if seat.kind == kind and seat.layer == layer]

    def features_of(self, number: int) -> list[int]:
        """Return the numbers of the seats that are features of one dictionary."""
        return [i for i, seat in enumerate(self.seats) if seat.kind == FEATURE and seat.part == number]

    def heads(self, index: int) -> Tensor:
        """Return what the output projection of a layer reads of every head: (T, H, d)."""
        if index not in self._heads:
            self._heads[index] = self.totals.heads(index)
        return self._heads[index]

    def pruned(self, index: int, layer: Layer) -> Tensor:
        """Return what all neurons of a layer write that are no nodes, in front of the norm on it: (T, D)."""
        if index not in self._pruned:
            totals, kept, out = self.totals, [self.seats[i] for i in self.of(NEURON, index)], None
            n = len(totals.trace.resid_final)
            for number, part in enumerate(totals.trace.layers[index].mlps):
                act = part_everywhere(part.act, part.positions, n).to(totals.dtype, copy=True)
                for seat in kept:
                    if seat.part == number:
                        act[seat.position, seat.index] = 0
                written = (act.to(totals.compute) @ layer.mlps[part.part].w_down.to(totals.compute).T).to(totals.dtype)
                out = written if out is None else out + written
            assert out is not None  # it is asked of layers with an MLP
            self._pruned[index] = out
        return self._pruned[index]

    def read_by(self, number: int, dictionary: Dictionary, kept: list[int]) -> tuple[Tensor, Tensor]:
        """Return the activations (K,) and the gradients (K, D) of the ``kept`` features of a dictionary."""
        if number not in self._features:
            seats = [self.seats[i] for i in kept]
            layer, site = dictionary.site
            x = self.totals.trace.resid(layer) if site == "resid_pre" else self.totals.trace.layers[layer].resid_mid
            positions = torch.tensor([seat.position for seat in seats], device=x.device)
            which = torch.tensor([seat.index for seat in seats])
            self._features[number] = dictionary.read(x, positions, which)
        return self._features[number]


class Walk:
    """One way back for some rows, the deepest first; of their gradients (R, T, D) the first ``active`` have begun."""

    def __init__(self, ways: Ways, rows: range) -> None:
        self.ways, self.rows, totals = ways, rows, ways.totals
        self.totals, self.trace = totals, totals.trace
        n, width = totals.trace.resid_final.shape
        device = totals.trace.resid_final.device
        self.back = torch.zeros(len(rows), n, width, dtype=totals.dtype, device=device)
        self.shares = torch.zeros(len(rows), n + len(ways.seats) + 2, dtype=totals.dtype, device=device)
        self.activations = torch.zeros(len(rows), dtype=totals.dtype, device="cpu")
        self.sizes = torch.zeros_like(self.activations)
        self.active, self.tokens = 0, n

    def walked(self) -> Direct:
        """Walk back through all layers."""
        totals, ways = self.totals, self.ways
        first = totals.adapter.n_layers
        if self.rows.start == 0:
            seeds = ways.reads.seeds[0].to(self.back)
            self.back[0, ways.reads.packing.at(True, seeds.device)] = seeds
            self.active = 1
        else:
            first = min(first, int(ways.seats[self.rows.start - 1].order // 2) + 2)
        for index in reversed(range(first)):
            self._pass_layer(index, totals.adapter.layer(index))
        self._pass_dictionary((0, "resid_pre"))
        x = self.trace.layers[0].resid_pre if self.trace.layers else self.trace.resid_final
        self.back = self.back.to(x.device)
        self.shares[:, : self.tokens] = torch.einsum("rtd,td->rt", self.back, x.to(self.back)).to(self.shares)
        return Direct(self.shares.cpu(), self.activations, self.sizes)

    def _pass_layer(self, index: int, layer: Layer) -> None:
        self.back = self.back.to(layer.device)
        self._pass_dictionary((index + 1, "resid_pre"))
        if layer.mlps:
            self._through_stream(layer.mlp, self.trace.layers[index].mlp_sum)
            self._end_at_neurons(index, layer)
        if not layer.parallel:
            self._begin_at_neurons(index, layer)
            self._pass_dictionary((index, "resid_mid"))
        if layer.attention is not None:
            if not layer.parallel:
                self._through_stream(layer.attention, self.trace.layers[index].attention_sum)
            self._through_attention(index, layer)
        if layer.parallel:
            self._begin_at_neurons(index, layer)

    # -- where a way ends -----------------------------------------------------------------------------------------

    def _add(self, column: int, worth: Tensor) -> None:
        """Add shares (r,) of a source to the rows that have begun; -1 is `bias`, -2 `others`."""
        self.shares[: self.active, column] += worth.to(self.shares)

    def _dot(self, y: Tensor, x: Tensor) -> Tensor:
        """Return Σ_n ⟨y[r, n], x[n]⟩: (r,); x (T, C) or (C,)."""
        return (y * x.to(y)).sum((1, 2))

    def _through_stream(self, branch: Branch, total: Tensor | None) -> None:
        norm, a = branch.stream, self.active
        if norm is None and branch.keeps != 1.0:
            self.back[:a] *= branch.keeps
        if norm is None or not a:
            return
        if norm.bias is not None:
            self._add(-1, self._dot(self.back[:a], norm.bias))
        scale = norm.frozen_scale(total, self.back.dtype)
        self.back[:a] = norm.transposed(self.back[:a], scale) * branch.keeps

    def _end_at_neurons(self, index: int, layer: Layer) -> None:
        """Give all neurons of a layer their shares: those that are nodes one by one, the rest together."""
        record, a = self.trace.layers[index], self.active
        if not a:
            return
        y = layer.mlp.written_transposed(self.back[:a], record.mlp.out_scale)
        self._add(-2, self._dot(y, self.ways.pruned(index, layer)))
        for number, kept in self._by_part(self.ways.of(NEURON, index)).items():
            part, seats = record.mlps[number], [self.ways.seats[i] for i in kept]
            positions, which = _places(seats, y.device)
            written = layer.mlps[part.part].w_down[:, which].T.to(y) * part.act[part.rows(positions), which][
                :, None
            ].to(y)
            worth = torch.einsum("rkd,kd->rk", y[:, positions], written)
            self.shares[:a, [self.tokens + i for i in kept]] += worth.to(self.shares)
        constant = record.mlp_constant(layer.mlps, slice(0, self.tokens), y.dtype)
        if constant is not None:
            self._add(-1, self._dot(self.back[:a], constant))

    def _pass_dictionary(self, site: Site) -> None:
        """Give the features that are nodes their shares; what they read is no way of others. Begin at those."""
        ways, dictionary = self.ways, self.ways.dictionaries.get(site)
        if dictionary is None:
            return
        number = list(ways.dictionaries).index(site)
        kept = ways.features_of(number)
        if not kept:
            return
        activations, gradients = ways.read_by(number, dictionary, kept)
        x, a = self._states(site), self.active
        before = self.back[:a].clone()
        for place, seat_number in enumerate(kept):
            seat = ways.seats[seat_number]
            n, amount = seat.position, dictionary.numbers[seat.position, seat.index]
            worth = before[:, n] @ (dictionary.vectors[seat.index] * amount).to(before)
            self._add(self.tokens + seat_number, worth)
            ratio, gradient = worth / activations[place].to(worth), gradients[place].to(before)
            self.back[:a, n] -= ratio[:, None] * gradient
            self._add(-1, -ratio * (activations[place].to(worth) - gradient @ x[n].to(gradient)))
        rows = ways.rows_at(order_of(site), self.rows)
        if rows:
            which = [kept.index(row - 1) for row in rows]
            positions = [ways.seats[row - 1].position for row in rows]
            read, given = gradients[which].to(self.back), activations[which].to(self.back)
            begun, products = [row - self.rows.start for row in rows], read * x[positions].to(read)
            self.back[begun, positions] = read
            self._begin(begun, given, given - products.sum(1), products)

    def _states(self, site: Site) -> Tensor:
        layer, name = site
        return self.trace.resid(layer) if name == "resid_pre" else self.trace.layers[layer].resid_mid

    # -- where a way begins, and attention --------------------------------------------------------------------------

    def _begin(self, rows: list[int], activations: Tensor, constants: Tensor | None, products: Tensor) -> None:
        """Begin rows, counted from the first one here: their activations (K,), constants (K,), and products (K, ...).

        The activation is the sum of the products and of the constant.
        """
        self.active += len(rows)
        self.activations[rows] = activations.to(self.activations)
        self.sizes[rows] = products.flatten(1).abs().sum(1).to(self.sizes)
        if constants is not None:
            self.shares[rows, -1] += constants.to(self.shares)
            self.sizes[rows] += constants.abs().to(self.sizes)

    def _by_part(self, numbers: list[int]) -> dict[int, list[int]]:
        """Return the seats of these numbers by the MLPs that they are of."""
        found: dict[int, list[int]] = {}
        for number in numbers:
            found.setdefault(self.ways.seats[number].part, []).append(number)
        return found

    def _begin_at_neurons(self, index: int, layer: Layer) -> None:
        """Begin where the neurons read that are nodes: with the rule's coefficients times their weights."""
        rows = self.ways.rows_at(read_by_mlp(index, layer.parallel), self.rows)
        record, dtype, rule = self.trace.layers[index], self.back.dtype, self.ways.rule
        for number, kept in self._by_part([row - 1 for row in rows]).items():
            trace, seats = record.mlps[number], [self.ways.seats[i] for i in kept]
            weights, (positions, which) = layer.mlps[trace.part], _places(seats, trace.gate.device)
            recorded, each = trace.rows(positions), torch.arange(len(kept), device=trace.gate.device)
            shares = linear_shares(rule, weights, trace, recorded, dtype)
            read = shares.gate[each, which][:, None] * weights.w_gate[which].to(dtype)
            up = reads_up(rule, weights) and shares.up is not None
            if up and shares.up is not None:
                read = read + shares.up[each, which][:, None] * weights.w_up[which].to(dtype)
            if trace.input_weight is not None:
                read = read * trace.input_weight[recorded, None].to(read)
            x = trace.resid[positions].to(dtype)
            read = FrozenNorm.of(weights.norm, x, dtype).back(read[None])[0]
            driven = shares.of_bias(weights.gate_constant(dtype), weights.up_constant(dtype) if up else None)
            constants = torch.zeros_like(each, dtype=dtype) if driven is None else driven[each, which]
            begun = [i + 1 - self.rows.start for i in kept]
            self.back[begun, positions] = read
            self._begin(begun, trace.act[recorded, which], constants, read * x)

    def _through_attention(self, index: int, layer: Layer) -> None:
        """Take the gradients through a layer's attention, but for the heads that are nodes, and begin at these."""
        ways, weights, record = self.ways, layer.attention, self.trace.layers[index].attention
        kept, a = ways.of(HEAD, index), self.active
        beginning = ways.rows_at(2.0 * index, self.rows)
        if not a and not beginning:
            return
        way, d = self.totals.way(index, layer), weights.head_dim
        y = way.of_heads(self.back[:a]).to(self.back.dtype)  # (r, T, H·d)
        self._constants_of_attention(index, layer, y)
        for number in kept:
            seat = ways.seats[number]
            own = slice(seat.index * d, (seat.index + 1) * d)
            self._add(self.tokens + number, y[:, seat.position, own] @ ways.heads(index)[seat.position, seat.index])
            y[:, seat.position, own] = 0
        if beginning:
            given, seeds = self.totals.of_heads(index, layer), y.new_zeros(len(beginning), *y.shape[1:])
            seats = [ways.seats[row - 1] for row in beginning]
            positions, which = _places(seats, y.device)
            read = given[positions, which]
            each = torch.arange(len(seats), device=y.device)
            seeds.unflatten(-1, (-1, d))[each, positions, which] = read
            activations = torch.tensor([seat.share for seat in seats], dtype=torch.float64)
            products = read * ways.heads(index)[positions, which]
            self._begin([row - self.rows.start for row in beginning], activations, None, products)
            y = torch.cat([y, seeds])
        of_values = self._of_values(index, layer, way, y.to(way.compute))
        norm = FrozenNorm.of(weights.norm, record.resid, self.back.dtype)
        self.back[: self.active] += norm.back(way.of_read(of_values, self.back.dtype))

    def _of_values(self, index: int, layer: Layer, way: WayThroughAttention, y: Tensor) -> Tensor:
        """Return the gradients (r, T, Hkv·d) of the values, given those of what the output projection reads."""
        return way.through_heads(y, None)[0]

    def _constants_of_attention(self, index: int, layer: Layer, y: Tensor) -> None:
        if not len(y):
            return
        weights, record = layer.attention, self.trace.layers[index].attention
        outputs = LayerOutputs(self.totals.adapter, self.trace, index, 0, y.dtype)
        heads = outputs.constant_heads()
        if heads is not None:
            self._add(-1, self._dot(y, heads.flatten(1)))
        written = weights.written_constant(weights.o.bias, record.out_scale, y.dtype)
        if written is not None:
            self._add(-1, self._dot(self.back[: self.active], written))


def _places(seats: Sequence[Seat], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the positions and the indices of seats, (K,) each."""
    pairs = torch.tensor([(seat.position, seat.index) for seat in seats], device=device)
    return pairs[:, 0].contiguous(), pairs[:, 1].contiguous()
