"""The way back through all layers: gradients of every site, and the scores of heads and neurons on the way.

A score is linear in the components under a linear rule: score[m] = Σ_n ⟨λ[n], X[n, m]⟩ + what constants add to `bias`,
with one gradient λ per site for all components of all kinds (docs/rules.md).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..adapters import Adapter, Branch, Layer
from ..adapters.shift import Shift
from ..adapters.streams import LayerStreams, StreamStep
from ..components.base import Entry
from ..runtime.precision import full_precision
from ..runtime.progress import Parts
from ..trace.record import LayerTrace, MlpTrace, Trace
from .attention import WayThroughAttention
from .batches import Packing
from .mlp import WayThroughMlp
from .pages import Pages, Wanted
from .shared import Owed
from .steering import Steers, Taken


@full_precision()
def walk_back(
    adapter: Adapter,
    trace: Trace,
    packing: Packing,
    seeds: Tensor,
    end: int,
    rule: str,
    wanted: Wanted,
    compute: torch.dtype,
    budget: int,
    progress: Parts | None = None,
    steers: Steers | None = None,
) -> Pages:
    """Take gradients ``seeds`` (R, A, D) at the read positions, in front of layer ``end``, back as far as is wanted.

    Products run in ``compute``, everything else in the dtype of the seeds. ``budget`` bounds what an MLP holds, in
    bytes. ``steers`` opens the book of attention: its rows are behind those of ``seeds``.
    """
    way = _WayBack(trace, packing, seeds, end, rule, wanted, compute, budget, steers)
    for index in reversed(range(wanted.last.layer, end)):
        way.pass_layer(index, adapter.layer(index), adapter.is_parallel)
        if progress is not None:
            progress.finish()
    way.pages.off = 0.0 if steers is None else steers.off
    return way.pages.brought_home()


class _WayBack:
    """A way back that is under way; arguments as of :func:`walk_back`."""

    def __init__(
        self,
        trace: Trace,
        packing: Packing,
        seeds: Tensor,
        end: int,
        rule: str,
        wanted: Wanted,
        compute: torch.dtype,
        budget: int,
        steers: Steers | None,
    ) -> None:
        self._steers, self._rows = steers, len(seeds)
        if steers is not None and not steers.keeps:
            seeds = torch.cat([seeds, torch.zeros_like(seeds)])
            self._changed = self._amount = seeds.new_zeros(self._rows, packing.n_prompts)
        self._trace, self._packing, self._wanted = trace, packing, wanted
        self._rule, self._compute, self._budget = rule, compute, budget
        self._back, self._partial = seeds, True
        self._owed = Owed()
        self._read: tuple[tuple[int, bool], Tensor, Tensor] | None = None
        self._after = seeds.new_zeros(len(seeds), packing.n_prompts)
        self.pages = Pages()
        self._visit(Entry(end, "resid_pre"), trace.resid(end))

    def pass_layer(self, index: int, layer: Layer, parallel: bool) -> None:
        """Take the gradients back through a layer, or through its MLP alone where the way ends."""
        record = self._trace.layers[index]
        self._back, self._after = self._back.to(layer.device), self._after.to(layer.device)
        if self._steers is not None and not self._steers.keeps:
            self._changed, self._amount = self._changed.to(layer.device), self._amount.to(layer.device)
        if record.streams is not None:
            self._through_streams(index, layer, record, record.streams)
            return
        if record.spreads:
            self._through_spreading(index, layer, record)
            return
        beta = self._through_stream(layer.mlp, record.mlp_sum) if layer.mlps else None
        if parallel:
            read = self._everywhere(self._through_mlp(index, layer, record, beta), self._partial)
            self._through_attention(index, layer, record, None)
            self._back += read
        else:
            if layer.mlps and layer.mlp.front is not None:
                self._through_shifted_mlp(index, layer, record, layer.mlp.front)
            elif layer.mlps:
                self._back = self._back + self._through_mlp(index, layer, record, beta)
            self._pay(Entry(index, "resid_mid"))
            self._visit(Entry(index, "resid_mid"), record.resid_mid)
            if self._wanted.last == Entry(index, "resid_mid"):
                return
            if layer.attention is not None:
                beta = self._through_stream(layer.attention, record.attention_sum)
                self._through_attention(index, layer, record, beta)
            self._pay(Entry(index, "resid_pre"))
        self._visit(Entry(index, "resid_pre"), record.resid_pre)

    def _through_spreading(self, index: int, layer: Layer, record: LayerTrace) -> None:
        """Take the gradients back through a layer whose branches write to later positions, by the transposes."""
        beta = self._through_stream(layer.mlp, record.mlp_sum)
        end = self._back = self._everywhere(self._back, self._partial)
        self._partial = False
        self._back = self._written_back(layer.mlp, end)
        self._back = end + self._through_mlp(index, layer, record, beta)
        self._pay(Entry(index, "resid_mid"))
        self._visit(Entry(index, "resid_mid"), record.resid_mid)
        if self._wanted.last == Entry(index, "resid_mid"):
            return
        beta = self._through_stream(layer.attention, record.attention_sum)
        end, self._back = self._back, self._written_back(layer.attention, self._back)
        self._back = end + self._attention_back(index, layer, record, beta)
        self._pay(Entry(index, "resid_pre"))
        self._visit(Entry(index, "resid_pre"), record.resid_pre)

    def _written_back(self, branch: Branch, gradients: Tensor) -> Tensor:
        """Return the gradients (R, T, D) of what a branch writes in front of its convolution."""
        return gradients if branch.spread is None else branch.spread.back(gradients, self._packing.offsets)

    def _through_streams(self, index: int, layer: Layer, record: LayerTrace, maps: LayerStreams) -> None:
        """Take the gradients back through a layer of several streams, by the transposes of its frozen maps."""
        at = self._packing.at(self._partial, self._back.device)
        if maps.entering is not None:
            entering = maps.entering.to(self._back)  # from the next layer's device
            self._note_embedded(entering if at is None else entering[at])
        if maps.mlp is not None:
            mlp, gate = maps.mlp.at(at), None if maps.gate is None else maps.gate.at(at)
            self._through_mlps_of_streams(index, layer, record, mlp, gate)
        self._visit(Entry(index, "resid_mid"), record.resid_mid)
        if self._wanted.last == Entry(index, "resid_mid"):
            return
        attention, end = maps.attention.at(at), self._back
        written = attention.writes_back(end)
        passed, self._back = attention.passes_back(end), written
        if layer.side is not None and attention.side is not None:
            passed = passed + attention.reads_back(layer.side.back(written, attention.side.to(written)))
        found = self._attention_back(index, layer, record, None)
        source = layer.attention.source
        self._back = self._everywhere(passed, self._partial) if source is None else passed
        if source is None:
            self._back = self._back + maps.attention.reads_back(found)
            self._partial = False
        else:
            self._owe_values(source, found)
        self._pay(Entry(index, "resid_pre"))
        self._visit(Entry(index, "resid_pre"), record.resid_pre)

    def _note_embedded(self, entering: Tensor) -> None:
        """Note what the next layer's own embeddings, (A, n·D) where gradients arrive, are worth at every position."""
        worth = (self._back * entering).sum(-1)
        self._after = self._after + self._packing.sum(worth, self._partial)
        worth = self._everywhere(worth[..., None], self._partial)[..., 0]
        before = self.pages.embedded
        self.pages.embedded = worth if before is None else before.to(worth) + worth

    def _through_mlps_of_streams(
        self, index: int, layer: Layer, record: LayerTrace, mlp: StreamStep, gate: StreamStep | None
    ) -> None:
        """Take the gradients back through the MLPs of such a layer, given the maps at the positions where they are."""
        end, neurons, behind = self._back, {}, None
        *after, first = _stages(layer, record)
        for stage in after:  # the gate of the token's embedding
            assert gate is not None  # the record has one where its layer has
            of_read = self._stage(index, layer, record, stage, gate.writes_back(end), None, neurons)
            assert of_read is not None  # nothing is read ahead
            self._back = gate.passes_back(end) + gate.reads_back(of_read)
            behind = mlp.writes_back(gate.passes_back(end))
        of_read = self._stage(index, layer, record, first, mlp.writes_back(self._back), behind, neurons)
        assert of_read is not None
        self._back = mlp.passes_back(self._back) + mlp.reads_back(of_read)
        self._keep_neurons(index, record, neurons)

    def _owe_values(self, source: int, gradients: Tensor) -> None:
        """Let the gradients of what the attention of layer ``source`` reads wait for what enters that layer."""
        streams = self._trace.layers[source].streams
        if streams is not None:  # these are of what the layer reads of its streams
            gradients = streams.attention.reads_back(gradients)
        self._owed.owe(Entry(source, "resid_pre"), gradients)

    def _pay(self, place: Entry) -> None:
        """Add the gradients that wait for a place, where there are any."""
        owed = self._owed.paid(place)
        if owed is not None:
            self._back, self._partial = self._everywhere(self._back, self._partial) + owed.to(self._back), False

    def _through_mlp(self, index: int, layer: Layer, record: LayerTrace, beta: Tensor | None) -> Tensor:
        """Return the gradients (R, A, D) of what the MLP reads, and note what it and its constants are worth."""
        gradients, neurons = None, {}
        for number, stage in enumerate(_stages(layer, record)):
            behind = self._back if number else None  # the first stage is the last that the model runs
            arriving = self._back if gradients is None else self._back + gradients
            found = self._stage(index, layer, record, stage, arriving, behind, neurons)
            if found is not None:
                gradients = found if gradients is None else gradients + found
        self._add(self.pages.of_mlp, index, [beta])
        self._keep_neurons(index, record, neurons)
        assert gradients is not None  # the layer has an MLP
        return gradients

    def _through_shifted_mlp(self, index: int, layer: Layer, record: LayerTrace, front: Shift) -> None:
        """Take the gradients back through an MLP that reads two positions, to all; note what constants are worth."""
        behind, ratio, at = self._back, record.mlp.out_ratio, self._packing.at(self._partial, self._back.device)
        if ratio is not None:
            self._back = behind * (ratio if at is None else ratio[at]).to(behind)
        read = self._everywhere(self._through_mlp(index, layer, record, None), self._partial)
        lengths = self._packing.lengths
        constant = front.constant(lengths, read)
        if constant is not None:
            self._add(None, index, [self._packing.sum((read * constant).sum(-1), False)])
        self._back = self._everywhere(behind, self._partial) + front.back(read, record.resid_mid, lengths)
        self._partial = False

    def _stage(
        self,
        index: int,
        layer: Layer,
        record: LayerTrace,
        stage: list[tuple[MlpTrace, ...]],
        arriving: Tensor,
        behind: Tensor | None,
        neurons: dict[int, Tensor],
    ) -> Tensor | None:
        """Return the gradients of what the MLPs of a stage read here, given those ``arriving``; note their ``neurons``.

        Those of experts that read ahead wait for the place that they read.
        """
        how = (self._packing, self._partial, self._rule, self._compute, self._budget)
        gradients: Tensor | None = None
        for parts in stage:
            way = WayThroughMlp(layer.mlps, record, parts, *how)
            found = way.back(arriving, self._states(parts[0].resid, arriving), index in self._wanted.neurons, behind)
            for part, of_part in zip(parts, found.neurons or (), strict=False):
                neurons[part.part] = of_part
            self._add(self.pages.of_mlp, index, [found.constant])
            self._add(None, index, [found.driven])
            source = layer.mlps[parts[0].part].source
            if source is not None:
                self._owed.owe(Entry(source, "resid_mid"), self._everywhere(found.gradients, self._partial))
                continue
            gradients = found.gradients if gradients is None else gradients + found.gradients
        return gradients

    def _keep_neurons(self, index: int, record: LayerTrace, neurons: dict[int, Tensor]) -> None:
        """Note the scores of a layer's neurons, if they were asked for."""
        if neurons:
            self.pages.neurons[index] = [neurons[part.part] for part in record.mlps]

    def _through_attention(self, index: int, layer: Layer, record: LayerTrace, beta: Tensor | None) -> None:
        """Take the gradients back through attention, to all positions; note what it and its constants are worth."""
        taken = self._looking(index, layer, record)
        gradients = self._attention_back(index, layer, record, beta)
        source = layer.attention.source
        if source is not None:  # it reads what enters another layer, and nothing of this one
            self._owe_values(source, gradients)
            return
        self._back = gradients + self._everywhere(self._back, self._partial)
        self._partial = False
        if taken is not None:
            self._back[self._rows :] += taken.gradients
            self._add(None, index, [torch.cat([torch.zeros_like(taken.worth), taken.worth])])
            self._changed, self._amount = self._changed + taken.change, self._amount + taken.size

    def _attention_back(self, index: int, layer: Layer, record: LayerTrace, beta: Tensor | None) -> Tensor:
        """Return the gradients (R, T, D) of what attention reads; note what it and its constants are worth."""
        assert layer.attention is not None and record.attention is not None  # see pass_layer
        way = WayThroughAttention(layer.attention, record.attention, self._packing, self._partial, self._compute)
        x, front = self._states(record.attention.resid, self._back, everywhere=True), layer.attention.front
        constant = None if front is None else front.constant(self._packing.lengths, x)
        found = way.back(self._back, x if constant is None else x - constant, index in self._wanted.heads)
        if found.heads is not None:
            self.pages.heads[index] = found.heads
        self._add(self.pages.of_attention, index, [found.constant, beta])
        if front is not None:
            return front.back(found.gradients, record.resid_pre, self._packing.lengths)
        return found.gradients

    def _looking(self, index: int, layer: Layer, record: LayerTrace) -> Taken | None:
        """Return what the book of attention takes up here; None without such a book."""
        if self._steers is None:
            return None
        assert layer.attention is not None and record.attention is not None  # see pass_layer
        given = (layer.attention, record.attention, self._packing, self._partial, self._back[: self._rows])
        return self._steers.through(index, *given)

    def _through_stream(self, branch: Branch, total: Tensor | None) -> Tensor | None:
        """Take the gradients back through a norm of the stream behind a branch; return what its β is worth (R, P)."""
        norm = branch.stream
        if norm is None:
            self._back = self._back if branch.keeps == 1.0 else self._back * branch.keeps
            return None
        beta = None if norm.bias is None else self._packing.sum(self._back @ norm.bias.to(self._back), self._partial)
        if norm.is_factor:
            self._back = norm.transposed(self._back, None)
            return beta
        assert total is not None  # it is recorded wherever there is such a norm
        at = self._packing.at(self._partial, self._back.device)
        scale = norm.scale((total if at is None else total[at]).to(self._back.dtype))
        self._back = norm.transposed(self._back, scale)
        self._back = self._back if branch.keeps == 1.0 else self._back * branch.keeps
        return beta

    def _add(self, own: dict[int, Tensor] | None, index: int, worth: Iterable[Tensor | None]) -> None:
        """Add what constants are worth (R, P) to that of all constants behind, and note it as a layer's own."""
        for one in worth:
            if one is None:
                continue
            self._after = self._after + one
            if own is not None:
                own[index] = own[index] + one if index in own else one

    def _visit(self, site: Entry, x: Tensor) -> None:
        """Note the total and the constants of a site, whose states are ``x`` (T, D), and its gradients if wanted."""
        self.pages.totals[site] = self._packing.dot(self._back, self._states(x, self._back), self._partial)
        self.pages.constants[site] = self._owed.add_worth(self._after, self._packing, self._trace)
        if self._steers is not None and not self._steers.keeps:
            self.pages.changes[site], self.pages.sizes[site] = self._changed, self._amount
        if self._wanted.keeps(site):
            self.pages.gradients[site] = self._everywhere(self._back, self._partial)

    def _states(self, x: Tensor, like: Tensor, everywhere: bool = False) -> Tensor:
        """Return hidden states (T, D) ``like`` gradients, at their positions or everywhere; the last are kept."""
        at = None if everywhere else self._packing.at(self._partial, x.device)
        key = id(x), at is None
        if self._read is None or self._read[0] != key:
            self._read = key, x, (x if at is None else x[at]).to(like)
        return self._read[2]

    def _everywhere(self, gradients: Tensor, partial: bool) -> Tensor:
        """Return gradients (R, A, D) as those of all positions, (R, T, D)."""
        if not partial:
            return gradients
        out = gradients.new_zeros(len(gradients), self._packing.n_positions, gradients.shape[2])
        out[:, self._packing.at(True, gradients.device)] = gradients
        return out


def _stages(layer: Layer, record: LayerTrace) -> list[list[tuple[MlpTrace, ...]]]:
    """Return the MLPs of a layer on the way back: those that follow the others, then the others, by their norms."""
    after = tuple(part for part in record.mlps if layer.mlps[part.part].follows)
    each = [(part, layer.mlps[part.part]) for part in record.mlps]
    routed = tuple(part for part, mlp in each if mlp.is_routed or mlp.is_linear)
    plain = tuple(part for part, mlp in each if mlp.is_dense)
    apart = bool(routed and plain) and layer.mlps[routed[0].part].norm is not layer.mlps[plain[0].part].norm
    return [stage for stage in ([after], [routed, plain] if apart else [routed + plain]) if any(stage)]
