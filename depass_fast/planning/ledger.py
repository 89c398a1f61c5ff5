"""The outlook of a way back under a linear rule: memory and arithmetic for any workspace, from shapes alone.

Bytes that are held at once are listed block by block, as :mod:`depass_fast.ledger` makes them: its attention, its MLP,
the gradients that are kept. Whoever changes a buffer there changes its block here. The sizes of its pieces stand there,
in rooms that know this one; a test compares them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from ..adapters import Adapter
from ..allocation import Allocation
from ..backends import has_compute_dtype
from ..backends.workload import BUSIEST, LayerSize
from ..components.base import ComponentKind, Entry
from ..components.model import Heads, Modules, Neurons
from ..linear_rules import at_once
from .adjoint import start_bytes
from .recurrences import MixerSize, mixer_sizes
from .shapes import ForwardPass, RunShape, layer_sizes, named_components, reach

CPU_WORKSPACE, GPU_WORKSPACE, LEAST_WORKSPACE = 1 << 27, 1 << 30, 1 << 20
CPU_TILE, GPU_TILE = 1 << 22, 1 << 26  # probabilities of a tile
SHORT = 64  # prompts of up to so many positions are padded to the longest of them
HELD = 12  # numbers per neuron, position and row for which a chunk's budget is divided
_TILES = 2  # the logits, and P
_SHARES = 7  # numbers per neuron and position of the block whose coefficients are being made
_ROWS = 3  # numbers per neuron, position and row: gradients, and those of gates and ups
_MIXED = 3  # times that gradients of a recurrence's values are held
_FACTORS = 5  # numbers per channel of its values: by what they are multiplied at the taps of a convolution, and these
_CURVE = 3  # times that the values of a curve are held
_NAME = 80  # bytes of a label in all lists that hold it


@dataclass(frozen=True)
class LedgerWorkload:
    """A way back with ``rows`` gradients of every position from the input of layer ``end`` to ``last``.

    ``lengths`` are the positions of every prompt, ``reads`` those of all prompts that are read. ``sites`` are those
    whose gradients are kept, ``neurons`` and ``heads`` the layers whose scores are. ``item`` are bytes per number of a
    gradient, ``compute`` of products, ``wide`` of probabilities. ``casts``: the weights are not in the products' dtype;
    ``widens``: what was recorded is not in the gradients'. ``after`` are the bytes that the answers take, ``names`` the
    labels.
    """

    layers: list[LayerSize]
    width: int
    rows: int
    lengths: tuple[int, ...]
    reads: int
    end: int
    last: Entry
    sites: frozenset[Entry]
    neurons: frozenset[int]
    heads: frozenset[int]
    rule: str
    item: int
    compute: int
    wide: int
    casts: bool
    widens: bool
    on_cpu: bool
    after: int
    names: int
    mixers: list[MixerSize | None]  # of every layer
    streams: int = 1  # residual streams, whose gradients lie side by side
    middle: int = 1  # those between attention and MLP

    @property
    def positions(self) -> int:
        return sum(self.lengths)

    @property
    def gradient(self) -> int:
        """Bytes of the gradients of all streams."""
        return self.rows * self.positions * self.streams * self.width * self.item

    def _of_sites(self, sites: Iterable[Entry]) -> int:
        """Return the bytes of the gradients of some sites."""
        streams = sum(self.middle if site.site == "resid_mid" else self.streams for site in sites)
        return streams * self.gradient // self.streams

    @property
    def passed(self) -> range:
        return range(self.last.layer, self.end)

    @property
    def kept(self) -> int:
        """Bytes of the gradients and scores that are kept to the end."""
        return self._of_sites(self.sites) + sum(map(self._scores, self.passed))

    def _scores(self, index: int) -> int:
        """Return the bytes of the scores of a layer's neurons and heads."""
        size, neurons = self.layers[index], self.layers[index].reached(self.positions)
        numbers = neurons * (index in self.neurons) + size.heads * (index in self.heads)
        return self.rows * len(self.lengths) * numbers * self.item

    def _queries(self, index: int) -> int:
        """Return the positions where gradients arrive at a layer."""
        behind = self.layers[index + 1 : self.end]  # values of an earlier layer pass no gradients on to other positions
        return self.reads if all(size.source is not None for size in behind) else self.positions

    def _owed(self, index: int) -> int:
        """Return how many earlier places have gradients waiting for them when the way is at layer ``index``."""
        sources = {size.source for size in self.layers[index : self.end] if size.source is not None}
        ahead = index < self.end and self.layers[index].ahead
        return sum(source <= index for source in sources) + ahead

    def _reads_up(self, index: int) -> bool:
        return self.rule != "taylor" and self.layers[index].has_up

    # -- bytes ----------------------------------------------------------------------------------------------------

    def peak(self, workspace: int) -> int:
        """Return the peak in bytes, beyond the trace and the model."""
        most = [sum(blocks) for blocks in self._phases(workspace)]
        return max(*most, self.kept + self.after) + _NAME * self.names

    def _phases(self, workspace: int) -> Iterator[list[int]]:
        """Yield the blocks that are held at once, phase by phase."""
        visited, scores = [Entry(self.end, "resid_pre")], 0
        for index in reversed(self.passed):
            held = self._held(visited) + scores + self.gradient * self._owed(index + 1)
            yield [held, *self._mlp(index, workspace)]
            yield [held, *[self._arriving(index)] * 3]
            if self.layers[index].parallel:
                held += self.gradient  # what the MLP reads waits for attention
            else:
                visited.append(Entry(index, "resid_mid"))
                held = self._held(visited) + scores + self.gradient * self._owed(index)
            if self.last == Entry(index, "resid_mid"):
                return
            held += self.gradient * (self.streams > 1)  # what passes attention by
            for blocks in self._attention(index):
                yield [held, *blocks]
            visited.append(Entry(index, "resid_pre"))
            scores += self._scores(index)
        yield [self._held(visited) + scores, self.gradient, self._resid]

    def _held(self, visited: list[Entry]) -> int:
        """Return the bytes of the gradients that are kept by now, and of those that are under way."""
        under_way = visited[-1:] if visited[-1] not in self.sites else []
        return self._of_sites([*(site for site in visited if site in self.sites), *under_way])

    @property
    def _resid(self) -> int:
        return self.positions * self.streams * self.width * self.item * self.widens

    def _arriving(self, index: int) -> int:
        return self.rows * self._queries(index) * self.streams * self.width * self.item

    def _weight(self, width: int) -> int:
        return width * self.width * self.compute * self.casts

    def _mlp(self, index: int, workspace: int) -> list[int]:
        """Return the blocks of the chunk of an MLP that holds most."""
        size, queries, here = self.layers[index], self._queries(index), self._arriving(index)
        if not size.mlps:
            return []
        arriving = here * self.compute // self.item * (self.compute != self.item)
        normed = queries * self.width * self.compute * (self.rule != "taylor") + self._norm(queries)
        most = max(1, workspace // (self.rows * size.neurons * self.item * HELD))
        neurons = int(max(min(most, min(1.0, BUSIEST * share) * queries) * count for count, share in size.mlps))
        numbers = self.rows * _ROWS + 2 + self._reads_up(index) + self.rows * (self.compute != self.item)
        block, values = at_once(self.on_cpu)
        chunk = neurons * self.item * numbers + min(neurons, block) * _SHARES * self.wide
        chunk += min(8 * neurons, values) * _CURVE * self.wide * (self.rule == "shapley")
        weights = self._weight(size.neurons) * (3 if self._reads_up(index) else 2)
        return [here, arriving, normed, chunk, weights, size.made * max(4, self.compute)]

    def _norm(self, queries: int) -> int:
        """Return the bytes of a frozen norm, and of the states that it is of where they are converted."""
        return queries * self.width * self.item * (1 + self.widens)

    def _attention(self, index: int) -> Iterator[list[int]]:
        """Yield the blocks of an attention: while P is made and applied, while heads are scored, and at its end."""
        size, queries = self.layers[index], self._queries(index)
        weights = max(self._weight(size.o), self._weight(size.v * size.read))
        y, through = (self.rows * n * size.o * self.compute for n in (queries, self._padded(queries)))
        out = self.rows * self._padded(self.positions) * size.o * self.compute
        read = self.rows * self.positions * size.v * self.compute
        scored = index in self.heads
        values = self.positions * size.v * self.item * scored
        norm = self._norm(self.positions) * size.read
        yield [y, values, norm, self.positions * self.width * size.read * self.item * scored, weights]
        mixer, joined = self.mixers[index], [self.gradient] * (3 if self.streams == 1 else 2)
        if mixer is not None:
            yield [y, values, norm, read, *self._mixing(size, mixer, scored)]
            yield [y, values, norm, read, *joined, weights]
            return
        tiles = self._tile(size, queries)
        yield [y, values, norm, read, through, out, *tiles, self._taken(size)]
        yield [y, values, norm, read, out, out * self.item // self.compute * scored]
        yield [y, values, norm, read, *joined, weights]

    def _mixing(self, size: LayerSize, mixer: MixerSize, scored: bool) -> list[int]:
        """Return the bytes of the way back through a recurrence, of one prompt after the other."""
        longest, item = max(self.lengths), max(4, self.item)
        every = self.rows * self.positions * size.o * item * (len(self.lengths) > 1)
        one, factors = self.rows * longest * size.o * item, _FACTORS * longest * size.o * item * scored
        return [every, _MIXED * one, max(mixer.mixed(longest, self.on_cpu) * item, factors + one * scored)]

    def _padded(self, positions: int) -> int:
        """Return so many positions of all prompts with the padding of those that go through attention together."""
        longest = max(self.lengths)
        if longest > SHORT or len(self.lengths) == 1 or not positions:
            return positions
        return positions * longest * len(self.lengths) // self.positions

    def _taken(self, size: LayerSize) -> int:
        """Return the bytes of the padded queries and keys of several prompts."""
        jagged = len(set(self.lengths)) > 1
        return 2 * size.o * self._padded(self.positions) * self.compute * jagged

    def _tile(self, size: LayerSize, queries: int) -> list[int]:
        """Return the bytes of a tile's logits and probabilities, and of its mask."""
        longest = max(self.lengths)
        all_of_them = size.heads * sum(n * (n if queries == self.positions else 1) for n in self.lengths)
        most = CPU_TILE if self.on_cpu else GPU_TILE
        numbers = min(all_of_them, max(most, longest))
        mask = numbers if size.o > size.v else min(numbers, longest * longest)
        return [(numbers * _TILES + mask) * self.wide, numbers * self.compute * self.narrows]

    @property
    def narrows(self) -> bool:
        """True if probabilities are applied in a narrower dtype than they are made in."""
        return self.compute < self.wide

    # -- FLOP -----------------------------------------------------------------------------------------------------

    def flop(self) -> float:
        """Return the FLOP of all products; a query meets (N + 1) / 2 keys."""
        return sum(map(self._layer_flop, self.passed))

    def _layer_flop(self, index: int) -> float:
        size, queries, width = self.layers[index], self._queries(index), 2.0 * self.width
        neurons = sum(count * share for count, share in size.mlps)
        reads_up = self._reads_up(index)
        mlp = width * queries * neurons * (self.rows * (2 + reads_up) + reads_up)
        if self.last == Entry(index, "resid_mid"):
            return mlp
        values = width * size.read * size.v * self.positions * (self.rows + (index in self.heads))
        pairs = sum(n * (n + 1) / 2 if queries == self.positions else n for n in self.lengths)
        return mlp + values + width * size.o * queries * self.rows + 2.0 * size.o * pairs * (1 + self.rows)


@dataclass(frozen=True)
class LedgerOutlook:
    """The forward pass of all prompts, then one way back for all of them.

    ``given`` are the bytes of workspace that were asked for, None if nobody asked.
    """

    work: LedgerWorkload
    forward: ForwardPass
    given: int | None
    layer: int
    n_components: int
    upper_bound: bool
    state: torch.dtype
    compute: torch.dtype

    @property
    def default_workspace(self) -> int:
        return self.given or (CPU_WORKSPACE if self.work.on_cpu else GPU_WORKSPACE)

    def smallest(self) -> int:
        """The workspace that is left when it is halved again and again, as the way back does where memory runs out."""
        workspace = self.default_workspace
        while workspace // 2 >= LEAST_WORKSPACE:
            workspace //= 2
        return workspace

    def fitting_workspace(self, free: int) -> int | None:
        """The default workspace, halved until ``free`` bytes hold the peak; None if the smallest is too large."""
        workspace, smallest = self.default_workspace, self.smallest()
        while workspace > smallest and self.peak(workspace) > free:
            workspace //= 2
        return workspace if self.peak(workspace) <= free else None

    def least(self) -> int:
        """The peak with the smallest workspace."""
        return self.peak(self.smallest())

    def peak(self, workspace: int) -> int:
        """Bytes beyond the loaded model."""
        return max(self.forward.peak, self.forward.held + self.work.peak(workspace))


def ledger_outlook(shape: RunShape, device: torch.device | None = None) -> LedgerOutlook:
    """Return the outlook of a way back on ``device``, by default the model's: for a ledger, or for ``shape.kind``."""
    adapter, options, device = shape.adapter, shape.options, device or shape.adapter.device
    rule = Allocation(options.allocation).linear_rule
    assert rule is not None, "the method was chosen by the rule"
    state, compute = options.dtypes(adapter.dtype, device)
    state = torch.promote_types(state, torch.float32)
    compute = compute if has_compute_dtype(options.backend) else state
    kinds, lengths = shape.kind.each(adapter), tuple(shape.carried_lengths)
    end = reach(kinds[-1], adapter, shape.end)[1]
    asked = _everything(adapter) if shape.is_ledger else _asked(kinds, adapter)
    counts = [max(named_components(one, adapter, n)[0] for n in lengths) for one in kinds]
    if shape.counts is not None:
        counts = [max(shape.counts)] * len(kinds)
    known = shape.counts is not None or all(named_components(one, adapter, 1)[1] for one in kinds)
    work = LedgerWorkload(
        layers=layer_sizes(adapter),
        width=adapter.hidden_size,
        rows=shape.gradients,
        lengths=lengths,
        reads=len(lengths) if shape.reads is None else sum(len(set(reads)) for reads in shape.reads),
        end=end,
        **asked,
        rule=rule,
        item=state.itemsize,
        compute=compute.itemsize,
        wide=max(4, compute.itemsize),
        casts=compute != adapter.dtype,
        widens=state != adapter.dtype,
        on_cpu=device.type == "cpu",
        after=0 if shape.is_ledger else _after(shape, kinds, counts, state),
        names=0 if shape.is_ledger else sum(counts) * len(lengths),
        streams=adapter.stream_width // adapter.hidden_size,
        middle=adapter.width_at("resid_mid") // adapter.hidden_size,
        mixers=mixer_sizes(adapter),
    )
    return LedgerOutlook(
        work=work,
        forward=ForwardPass.of(adapter, shape.lengths, shape.traced, device),
        given=options.memory_budget,
        layer=work.last.layer if shape.is_ledger else kinds[0].resolve(adapter),
        n_components=_number_of_all(work) if shape.is_ledger else max(counts),
        upper_bound=adapter.experts_per_position > 0 if shape.is_ledger else not known,
        state=state,
        compute=compute,
    )


def _everything(adapter: Adapter) -> dict:
    """Return what a ledger keeps: the gradients of all sites, and the scores of all neurons and heads."""
    layers = range(adapter.n_layers)
    mids = () if adapter.is_parallel else layers
    sites = [Entry(index, "resid_pre") for index in (*layers, adapter.n_layers)]
    return {
        "last": Entry(0, "resid_pre"),
        "sites": frozenset([*sites, *(Entry(index, "resid_mid") for index in mids)]),
        "neurons": frozenset(layers),
        "heads": frozenset(layers),
    }


def _asked(kinds: list[ComponentKind], adapter: Adapter) -> dict:
    """Return what the answers for ``kinds`` need, each of one layer."""
    sites, neurons, heads, ends = set(), set(), set(), []
    for kind in kinds:
        layer, entry = kind.resolve(adapter), kind.entry(adapter)
        which = kind.which if isinstance(kind, Modules) else ""
        if isinstance(kind, Neurons) or which == "mlp":
            neurons.add(layer)
            ends.append(Entry(layer, "resid_pre" if adapter.is_parallel else "resid_mid"))
        elif isinstance(kind, Heads) or which == "attention":
            heads.add(layer)
            ends.append(Entry(layer, "resid_pre"))
        else:
            sites.add(entry)
            ends.append(entry)
    last = min(ends, key=lambda entry: entry.order)
    return {"last": last, "sites": frozenset(sites), "neurons": frozenset(neurons), "heads": frozenset(heads)}


def _after(shape: RunShape, kinds: list[ComponentKind], counts: list[int], state: torch.dtype) -> int:
    """Return the bytes that the answers take: products of gradients, a start at a time, and scores four times."""
    adapter, longest, item = shape.adapter, max(shape.carried_lengths), state.itemsize
    products = 2 * shape.gradients * longest * adapter.stream_width * item
    starts = [
        sum(start_bytes(kind, adapter, longest, count, item, state != adapter.dtype))
        for kind, count in zip(kinds, counts, strict=True)
        if kind.kind in ("features", "custom", "subspaces")
    ]
    return products + max(starts, default=0) + 4 * shape.gradients * len(shape.lengths) * sum(counts) * item


def _number_of_all(work: LedgerWorkload) -> int:
    """Return the tokens of the longest prompt, and all heads and neurons."""
    longest = max(work.lengths)
    return longest + sum(work.layers[index].heads + work.layers[index].reached(longest) for index in work.passed)
