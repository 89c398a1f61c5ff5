"""The torch backend for a state that stays in host memory and passes through the device in blocks.

A layer takes two passes, in each of which every row is read once and written once. Attention takes every component by
itself. While a block is on the device for it, the statistics for the MLP behind it are gathered (:mod:`.statistics`;
for the softmax log Z). Once all blocks have passed, a component's share in the MLP depends on itself alone: that is the
second pass. Nothing is grouped: the numbers do not depend on the blocks beyond rounding.

Statistics of experts, and of an MLP behind a norm of the residual stream itself, take a pass of their own. With known
statistics some of the components can be carried without the others.

The cost model is :mod:`.stream_cost`: whoever changes a buffer here changes it there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..adapters import Adapter, Attention, Layer, Mlp
from ..allocation import Allocation
from ..labels import BIAS, REST
from ..runtime.products import product
from ..runtime.transfer import to_device
from ..state.layout import Layout
from ..state.state import ComponentState
from ..trace.record import AttentionTrace, LayerTrace, MlpTrace, Trace
from .statistics import GateBlock, Statistics
from .torch.adding import add_to_bias
from .torch.backend import TorchBackend
from .torch.blocks import Block, gather, scatter
from .torch.linear import linear_block
from .torch.mlp import MlpStep
from .torch.sharing import VALUES, SharedValues

_copy_all = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage] (many copies in one call: no public name)


@dataclass
class _Gathering:
    """An MLP and its statistics so far; ``key`` is the layer's number and the MLP's in it."""

    key: tuple[int, int]
    step: MlpStep
    statistics: Statistics


class StreamBackend(TorchBackend):
    """Carries a state in host memory; ``device`` is the one that computes.

    ``keep`` holds on to every layer's statistics, in ``kept``. ``known`` are such statistics, of a run with all
    components, of which the state may then hold a part.
    """

    name = "torch, streamed"
    streams = True
    joins = False
    streamable = False
    takes_factors = False

    def __init__(
        self,
        device: torch.device,
        compute_dtype: torch.dtype | None = None,
        memory_budget: int | None = None,
        keep: bool = False,
        known: dict[tuple[int, int], Statistics] | None = None,
    ) -> None:
        super().__init__(compute_dtype, memory_budget)
        self.device, self.keep, self.known = device, keep, known
        self.kept: dict[tuple[int, int], Statistics] = {}
        self._next: tuple[Mlp, MlpTrace, Allocation, bool] | None = None
        self._gathered: _Gathering | None = None

    def begin(self, adapter: Adapter, trace: Trace, first: int, end: int) -> None:
        pass  # neurons that write nothing are not left out

    def expect(self, layer: Layer, trace: LayerTrace, allocation: Allocation) -> None:
        first = [part for part in trace.mlps if not layer.mlps[part.part].follows]
        alone = len(first) == 1 and first[0].positions is None
        same = layer.attention.stream is None and layer.attention.keeps == 1.0  # for the MLP, as attention left it
        if self.known is None and alone and same and allocation.linear_rule is None:
            self._next = layer.mlps[trace.mlps[0].part], trace.mlps[0], allocation, layer.parallel

    # -- first pass -------------------------------------------------------------------------------------------------

    def aggregate_ov(
        self,
        state: ComponentState,
        weights: Attention,
        trace: AttentionTrace,
        queries: Layout | None = None,
        source: ComponentState | None = None,
    ) -> ComponentState:
        coming, self._next, self._gathered = self._next, None, None
        if queries is not None:
            return super().aggregate_ov(state, weights, trace, queries, source)
        device, attend = weights.w_v.device, self._attending(state, weights, trace, source)
        constant = self._attention_constant(state, weights, trace)
        ahead = None if coming is None else self._gathering(state, *coming[:3], device)
        reads_input = coming is not None and coming[3]

        def step(block: Block) -> None:
            x = self._take(state, block, device)
            with nullcontext() if ahead is None else ahead.statistics.undone_on_failure(_at(state.layout, block)):
                if ahead is not None and reads_input:
                    self._meet(x, state.layout, block, ahead)
                attend(x, block, x if source is None else self._take(source, block, device))
                _add_constant(x, state.layout, block, constant)
                if ahead is not None and not reads_input:
                    self._meet(x, state.layout, block, ahead)
                self._put(state, block, x)

        self._budget.each(device, lambda undone: self._blocks(state, weights, undone=undone, trace=trace), step)
        self._arrived(device)
        self._gathered = ahead
        return ComponentState(state.rows, state.layout, state.layer)

    def _aggregate_everywhere(
        self,
        state: ComponentState,
        weights: Attention,
        trace: AttentionTrace,
        extras_only: bool = False,
        source: ComponentState | None = None,
    ) -> ComponentState:
        state = super()._aggregate_everywhere(state, weights, trace, extras_only, source)
        self._arrived(weights.w_v.device)  # some of its positions are chosen next, in host memory
        return state

    def _meet_values(self, shared: SharedValues, state: ComponentState) -> None:
        key = (state.layer, VALUES)
        if self.known is not None:
            shared.statistics = self.known[key].on(shared.act.device)
            return
        super()._meet_values(shared, state)
        self._complete(shared.statistics)
        if self.keep:
            self.kept[key] = shared.statistics.on(state.device)

    def _gathering(
        self, state: ComponentState, weights: Mlp, trace: MlpTrace, allocation: Allocation, device: torch.device
    ) -> _Gathering:
        """Begin to gather for an MLP; with known statistics there is nothing left to gather."""

        def make() -> _Gathering:
            step = self._mlp_step(state, weights, trace, allocation, device)
            key = (state.layer, trace.part)
            if self.known is not None:
                return _Gathering(key, step, self.known[key].on(device))
            like = step.act.to(torch.promote_types(step.act.dtype, torch.float32))
            rest = state.layout.components[0].all.index(REST) is not None
            fresh = Statistics.fresh(str(allocation.rule), allocation.temperature, rest, like)
            return _Gathering(key, step, fresh)

        return self._budget.prepare(device, make)

    def _meet(self, rows: Tensor, layout: Layout, block: Block, gathering: _Gathering) -> None:
        """Take in a block, whose states are ``rows`` (r, D)."""
        at, step, statistics = _at(layout, block), gathering.step, gathering.statistics
        x, alive = _read(rows, layout, block, step)
        statistics.alive[at].add_(alive.sum(1))
        for part in self._parts(len(x) * x.shape[1], len(step.w_gate)):
            statistics.meet(self._gates(layout, block, x, alive, step, part), at, part)

    # -- second pass ------------------------------------------------------------------------------------------------

    def _complete(self, statistics: Statistics) -> None:
        """Make the statistics of what was gathered here those of all components. Here they are that already."""

    def allocate_mlp(
        self,
        state: ComponentState,
        weights: Mlp,
        trace: MlpTrace,
        allocation: Allocation,
        source: ComponentState | None = None,
    ) -> ComponentState:
        device, layout = weights.w_gate.device, state.layout
        if allocation.linear_rule is not None:
            return self._share_linearly(state, weights, trace, allocation.linear_rule, source or state)
        gathered, self._gathered = self._gathered, None
        if gathered is None or gathered.key != (state.layer, trace.part):
            gathered = self._gathering(state, weights, trace, allocation, device)
            if self.known is None:
                self._gather(source or state, gathered, device)
        self._complete(gathered.statistics)
        if self.keep:
            self.kept[gathered.key] = gathered.statistics.on(state.device)

        def share(block: Block) -> None:
            x = self._take(state, block, device)
            read = x if source is None else self._take(source, block, device)
            self._put(state, block, x.add_(self._gained(read, layout, block, gathered)))

        # a block that reads what it writes to is whole by then: a component's share needs nobody else's state
        self._budget.each(device, self._cut(layout, gathered.step.w_gate, device), share)
        self._arrived(device)
        add_to_bias(state, self._mlp_constant(state, weights, trace))
        return state

    def _share_linearly(
        self, state: ComponentState, weights: Mlp, trace: MlpTrace, rule: str, source: ComponentState
    ) -> ComponentState:
        device = weights.w_gate.device
        step = self._budget.prepare(device, lambda: self._linear_step(state, weights, trace, rule, device))

        def share(block: Block) -> None:
            x = self._take(state, block, device)
            read = x if source is state else self._take(source, block, device)
            dense, bias = scatter(read, block), _place(state.layout.index(BIAS), block)
            parts = self._parts(dense.shape[0] * dense.shape[1], len(step.w_gate))
            gained = linear_block(dense, step, _at(state.layout, block), parts, bias)
            self._put(state, block, x.add_(gather(gained.view(dense.shape), block)))

        cut = self._cut(state.layout, step.w_gate, device, held=2 if step.w_up is None else 3)
        self._budget.each(device, cut, share)
        self._arrived(device)
        return state

    def _gather(self, source: ComponentState, gathering: _Gathering, device: torch.device) -> None:
        """Take a pass for the statistics alone."""

        def meet(block: Block) -> None:
            with gathering.statistics.undone_on_failure(_at(source.layout, block)):
                self._meet(self._take(source, block, device), source.layout, block, gathering)

        self._budget.each(device, self._cut(source.layout, gathering.step.w_gate, device), meet)

    def _cut(
        self, layout: Layout, w_gate: Tensor, device: torch.device, held: int = 2
    ) -> Callable[[Block | None], list[Block]]:
        """Return a function that cuts a state into blocks for an MLP that holds so many numbers of a neuron at once."""
        width = w_gate.shape[1] + held * min(w_gate.shape[0], 512)

        def cut(undone: Block | None) -> list[Block]:
            slots = max(1, self._budget.bytes(self.device) // (2 * width * w_gate.dtype.itemsize))
            return self._cut_blocks(layout, slots, device, undone=undone)

        return cut

    def _gained(self, rows: Tensor, layout: Layout, block: Block, gathered: _Gathering) -> Tensor:
        """Return what the components of a block with states ``rows`` (r, D) receive: (r, D), in their dtype."""
        at, step, statistics = _at(layout, block), gathered.step, gathered.statistics
        x, alive = _read(rows, layout, block, step)
        out = x.new_zeros(x.shape[0] * x.shape[1], x.shape[2], dtype=rows.dtype)
        for part in self._parts(len(x) * x.shape[1], len(step.w_gate)):
            shares = statistics.shares(self._gates(layout, block, x, alive, step, part), at, part)
            shares = (shares * step.act[at, part][:, None]).to(x.dtype)
            out += product(shares.flatten(0, 1), step.w_down[:, part].T)
        return gather(out.view(x.shape), block)

    # -- both -------------------------------------------------------------------------------------------------------

    def _parts(self, places: int, n: int) -> list[slice]:
        """``n`` neurons in blocks that there is room for, with states at so many ``places``."""
        size = self._budget.bytes(self.device) // (8 * max(1, places) * 4)
        size = min(n, max(16, size))
        return [slice(i, min(i + size, n)) for i in range(0, n, size)]

    def _gates(self, layout: Layout, block: Block, x: Tensor, alive: Tensor, step: MlpStep, part: slice) -> GateBlock:
        at, components = _at(layout, block), layout.components[block.prompt]
        chosen = slice(block.first, block.first + block.n_components)
        g = product(x, step.w_gate[part].T).to(torch.promote_types(x.dtype, torch.float32))  # (n, b, i)
        bias, rest = (_place(layout.index(name), block) for name in (BIAS, REST))
        constant = None if bias is None or step.gate_constant is None else step.gate_constant[part]
        if constant is not None:
            g[:, bias] += constant
        away = components.births[chosen] != layout.local[at, None]
        return GateBlock(
            values=g,
            alive=alive,
            excluded=to_device(components.excluded[chosen] & away, x.device),
            members=to_device(components.members[chosen], x.device),
            rest=rest,
            bias=bias,
            constant=constant,
        )

    def _computes_on(self, state: ComponentState) -> torch.device:
        return self.device

    # -- between host and device --------------------------------------------------------------------------------------

    def _take(self, state: ComponentState, block: Block, device: torch.device, name: str = "rows") -> Tensor:
        """A copy of a block's rows on the device, straight from where they lie, which may be pinned."""
        runs = _runs(state, block)
        rows = state.rows.new_empty(sum(map(len, runs)), state.rows.shape[1], device=device)
        _copy_all(rows.split([len(run) for run in runs]), runs, non_blocking=state.rows.is_pinned())
        return rows

    def _put(self, state: ComponentState, block: Block, changed: Tensor) -> None:
        """Write back what :meth:`_take` gave; it is there after :meth:`_arrived`."""
        runs = _runs(state, block)
        _copy_all(runs, changed.split([len(run) for run in runs]), non_blocking=state.rows.is_pinned())

    def _arrived(self, device: torch.device) -> None:
        """Wait for what is on its way to host memory."""
        if self.streams and device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


def _at(layout: Layout, block: Block) -> slice:
    """The segments that a block's components can be alive at."""
    first = layout.segments(block.prompt).start + block.start
    return slice(first, first + block.n_positions)


def _counts(layout: Layout, block: Block) -> np.ndarray:
    """The number of a block's components that are alive at each of its positions (n,): one at least."""
    return np.clip(layout.counts[_at(layout, block)] - block.first, 0, block.n_components)


def _runs(state: ComponentState, block: Block) -> list[Tensor]:
    """A block's rows where they lie: neighbours at each position (c, D)."""
    if isinstance(block.rows, slice):
        return [state.rows[block.rows]]
    starts, counts = state.layout.starts[:-1][_at(state.layout, block)], _counts(state.layout, block)
    gaps = np.diff(starts, prepend=starts[0]) - np.concatenate([[0], counts[:-1]])  # others' rows, before each run
    region = state.rows[starts[0] + block.first : starts[-1] + block.first + counts[-1]]
    return list(region.split(np.stack([gaps, counts], 1).flatten().tolist())[1::2])


def _place(component: int | None, block: Block) -> int | None:
    """The place of a component in a block, None if it is not there."""
    if component is None or not block.first <= component < block.first + block.n_components:
        return None
    return component - block.first


def _read(rows: Tensor, layout: Layout, block: Block, step: MlpStep) -> tuple[Tensor, Tensor]:
    """A block's rows (r, D) as the gates read them (n, b, D), and which are not zero (n, b)."""
    rows = scatter(rows, block)
    scale = step.scale[_at(layout, block)]
    return (rows * scale[:, None, None]).to(step.act.dtype), (rows != 0).any(-1)


def _add_constant(rows: Tensor, layout: Layout, block: Block, constant: Tensor | None) -> None:
    """Add ``constant`` (D,) or (S, D) to the rows of `bias` in a block (r, D), if it is there."""
    bias = _place(layout.index(BIAS), block)
    if constant is None or bias is None:
        return
    at = _at(layout, block)
    counts = _counts(layout, block)
    places = to_device(np.cumsum(counts) - counts + bias, rows.device)
    rows[places] += (constant if constant.ndim == 1 else constant[at]).to(rows)
