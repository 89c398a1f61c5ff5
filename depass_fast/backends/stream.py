"""The torch backend for a state that does not fit on the device: it stays in host memory and passes through in blocks.

Attention takes every component by itself, so a block of components passes once. In the MLP blocks pass twice: first
for what they amount to together (:mod:`depass_fast.statistics`; log Z for the softmax), then each receives its share.
Nothing is grouped: the numbers do not depend on the blocks beyond rounding. Once the statistics are known, the first
pass is spared, and components can be carried that are not all there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..adapters import Mlp
from ..allocation import Allocation
from ..state import BIAS, REST, ComponentState, Layout
from ..statistics import GateBlock, Statistics
from ..trace import MlpTrace
from .blocks import Block, make_blocks
from .mlp import MlpStep
from .torch import TorchBackend, add_to_bias, scatter


class StreamBackend(TorchBackend):
    """As the torch backend; ``device`` is the one that computes.

    ``keep`` holds on to every layer's statistics, in ``kept``. ``known`` are such, of a run with all components; then
    ``members`` says for every prompt which of those components the state holds, (b,).
    """

    name = "torch, streamed"
    takes_factors = False

    def __init__(
        self,
        device: torch.device,
        compute_dtype: torch.dtype | None = None,
        memory_budget: int | None = None,
        keep: bool = False,
        known: dict[tuple[int, int], Statistics] | None = None,
        members: Sequence[np.ndarray] | None = None,
    ) -> None:
        super().__init__(compute_dtype, memory_budget)
        self.device, self.keep, self.known, self.members = device, keep, known, members
        self.kept: dict[tuple[int, int], Statistics] = {}

    def _bytes(self, state: ComponentState) -> int:
        return self.budget.bytes(self.device)

    def _take(self, rows: Tensor, index: Tensor | slice, device: torch.device) -> Tensor:
        """A copy of some of the rows on the device."""
        if isinstance(index, slice):
            return rows[index].to(device, copy=True, non_blocking=rows.is_pinned())
        return rows.index_select(0, index.to(rows.device)).to(device)

    def _put(self, rows: Tensor, index: Tensor | slice, changed: Tensor) -> None:
        if isinstance(index, slice):
            rows[index].copy_(changed)
        else:
            rows.index_copy_(0, index.to(rows.device), changed.to(rows))

    def allocate_mlp(
        self,
        state: ComponentState,
        weights: Mlp,
        trace: MlpTrace,
        allocation: Allocation,
        source: ComponentState | None = None,
    ) -> ComponentState:
        device, source, layout = weights.w_gate.device, source or state, state.layout
        step, out_scale = self.budget.prepare(device, lambda: self._mlp_step(state, weights, trace, allocation, device))
        cut = self._cut(layout, step, device)
        key = (state.layer, trace.part)
        if self.known is None:
            wide = torch.promote_types(step.act.dtype, torch.float32)
            rest = layout.index(REST) is not None
            statistics = Statistics.fresh(str(allocation.rule), allocation.temperature, rest, step.act.to(wide))

            def meet(block: Block) -> None:
                before = self._undoable(statistics, layout, block)
                try:
                    self._meet(source, block, step, statistics)
                except Exception:
                    before()
                    raise

            self.budget.each(device, cut, meet)
        else:
            statistics = self.known[key].on(device)
        if self.keep:
            self.kept[key] = statistics

        def share(block: Block) -> None:
            gained = self._gained(source, block, step, statistics)
            if block.slots is not None:
                gained = gained.index_select(0, block.slots)
            self._put(state.rows, block.rows, self._take(state.rows, block.rows, device).add_(gained))

        # a block that reads what it writes to is whole by then: a component's share needs nobody else's state
        self.budget.each(device, cut, share)
        add_to_bias(state, weights.constant(state.rows.dtype, out_scale))
        return state

    def _cut(self, layout: Layout, step: MlpStep, device: torch.device):
        width = step.w_gate.shape[1] + 2 * min(step.w_gate.shape[0], 512)

        def cut(undone: Block | None) -> list[Block]:
            slots = max(1, self.budget.bytes(self.device) // (2 * width * step.act.dtype.itemsize))
            begin = (0, 0) if undone is None else (undone.prompt, undone.first)
            return make_blocks(layout, slots, device, begin=begin)

        return cut

    def _undoable(self, statistics: Statistics, layout: Layout, block: Block):
        """How to put the statistics back as they were before a block."""
        at = self._at(layout, block)
        tables = {name: table[at].clone() for name, table in statistics.tables.items()}
        alive = statistics.alive[at].clone()

        def undo() -> None:
            statistics.alive[at].copy_(alive)
            for name, table in tables.items():
                statistics.tables[name][at].copy_(table)

        return undo

    @staticmethod
    def _at(layout: Layout, block: Block) -> slice:
        first = layout.segments(block.prompt).start + block.start
        return slice(first, first + block.n_positions)

    def _meet(self, source: ComponentState, block: Block, step: MlpStep, statistics: Statistics) -> None:
        at = self._at(source.layout, block)
        x, alive = self._read(source, block, step)
        statistics.alive[at].add_(alive.sum(1))
        for part in self._parts(x, step):
            statistics.meet(self._gates(source.layout, block, x, alive, step, part), at, part)

    def _gained(self, source: ComponentState, block: Block, step: MlpStep, statistics: Statistics) -> Tensor:
        """What the block's components receive, (n·b, D), in the state's dtype."""
        at = self._at(source.layout, block)
        x, alive = self._read(source, block, step)
        out = x.new_zeros(x.shape[0] * x.shape[1], x.shape[2], dtype=source.rows.dtype)
        for part in self._parts(x, step):
            shares = statistics.shares(self._gates(source.layout, block, x, alive, step, part), at, part)
            shares = (shares * step.act[at, part][:, None]).to(x.dtype)
            out += shares.flatten(0, 1) @ step.w_down[:, part].T
        return out

    def _read(self, source: ComponentState, block: Block, step: MlpStep) -> tuple[Tensor, Tensor]:
        """A block's states as the gates read them (n, b, D), and which are not zero (n, b)."""
        rows = scatter(self._take(source.rows, block.rows, step.act.device), block)
        scale = step.scale[self._at(source.layout, block)]
        return (rows * scale[:, None, None]).to(step.act.dtype), (rows != 0).any(-1)

    def _parts(self, x: Tensor, step: MlpStep) -> list[slice]:
        n = step.w_gate.shape[0]
        size = self.budget.bytes(self.device) // (8 * max(1, x.shape[0] * x.shape[1]) * 4)
        size = min(n, max(16, size))
        return [slice(i, min(i + size, n)) for i in range(0, n, size)]

    def _gates(self, layout: Layout, block: Block, x: Tensor, alive: Tensor, step: MlpStep, part: slice) -> GateBlock:
        at, components = self._at(layout, block), layout.components[block.prompt]
        chosen = slice(block.first, block.first + block.n_components)
        g = (x @ step.w_gate[part].T).to(torch.promote_types(x.dtype, torch.float32))  # (n, b, i)
        bias, rest = (None if i is None else i - block.first for i in (layout.index(BIAS), layout.index(REST)))
        if bias is not None and 0 <= bias < block.n_components and step.gate_constant is not None:
            g[:, bias] += step.gate_constant[part]
        births, excluded = (torch.from_numpy(a[chosen]).to(x.device) for a in (components.births, components.excluded))
        local = torch.from_numpy(layout.local[at]).to(x.device)
        members = np.arange(len(components)) if self.members is None else self.members[block.prompt]
        return GateBlock(
            values=g,
            total=step.gate[at, part].to(g.dtype),
            alive=alive,
            excluded=excluded & (births != local[:, None]),
            members=torch.from_numpy(members[chosen]).to(x.device),
            rest=rest if rest is not None and 0 <= rest < block.n_components else None,
        )
