"""A bounded workspace, and the cuts of a state into pieces that fit into it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ...adapters import Adapter, Attention, Mlp
from ...runtime.budget import Budget
from ...state.layout import Layout
from ...state.state import ComponentState
from ...trace.record import AttentionTrace, MlpTrace, Trace
from .. import active
from ..active import Groups
from ..base import Backend, Made
from .blocks import Block, Chunk, make_blocks, make_chunks
from .division import Division, default_budget
from .linear import Recorded
from .sharing import PARTS
from .workspace import Workspace


class BoundedBackend(Backend):
    """``memory_budget`` bounds the workspace in bytes; products run in ``compute_dtype``, by default the state's dtype.

    Where memory runs out all the same the workspace is halved, with a warning, and the work carries on.
    """

    def __init__(self, compute_dtype: torch.dtype | None = None, memory_budget: int | None = None) -> None:
        self.compute_dtype = compute_dtype
        self._workspace = Workspace()
        self._tables: WeakKeyDictionary[Layout, dict[object, Any]] = WeakKeyDictionary()
        # not a method: in a circle with the budget, buffers would live until Python looks for circles
        self._budget = Budget(memory_budget, default_budget, partial(_release, self._workspace, self._tables))

    def begin(self, adapter: Adapter, trace: Trace, first: int, end: int) -> None:
        active.look(adapter, trace, first, end)

    def prepare(self, device: torch.device, make: Callable[[], Made]) -> Made:
        return self._budget.prepare(device, make)

    def workspace_bytes(self, device: torch.device) -> int:
        return self._budget.bytes(device)

    def _dtype(self, state: ComponentState) -> torch.dtype:
        return self.compute_dtype or state.rows.dtype

    def _computes_on(self, state: ComponentState) -> torch.device:
        return state.device

    def _bytes(self, state: ComponentState) -> int:
        return self._budget.bytes(self._computes_on(state))

    def _table(self, layout: Layout, key: object, make: Callable[[], Made]) -> Made:
        """Return what ``make`` makes of a layout, made once and kept as long as the layout and the workspace."""
        tables = self._tables.setdefault(layout, {})
        if key not in tables:
            tables[key] = make()
        return tables[key]

    def _division(
        self, state: ComponentState, dtype: torch.dtype | None = None, ways_in: int | None = None
    ) -> Division:
        """The division for products in ``dtype``, by default :meth:`_dtype`; ``ways_in`` under a linear rule."""
        item, on_cpu = (dtype or self._dtype(state)).itemsize, self._computes_on(state).type == "cpu"
        return Division(self._bytes(state), item, state.rows.dtype.itemsize, on_cpu, ways_in)

    def _slots(self, state: ComponentState, weights: Attention) -> int:
        v, o = (n * weights.head_dim for n in (weights.n_kv_heads, weights.n_heads))
        return self._division(state).slots(max(state.rows.shape[1], weights.v.shape[1]), v, o)

    def _blocks(
        self,
        state: ComponentState,
        weights: Attention,
        extras_only: bool = False,
        undone: Block | None = None,
        trace: AttentionTrace | None = None,
    ) -> list[Block]:
        """Blocks of components for attention, all of them or those from an undone one on."""
        slots = self._slots(state, weights)
        if trace is not None and trace.value_rule is not None:
            slots = max(1, slots // PARTS)
        return self._cut_blocks(state.layout, slots, weights.w_v.device, extras_only, undone)

    def _cut_blocks(
        self,
        layout: Layout,
        slots: int,
        device: torch.device,
        extras_only: bool = False,
        undone: Block | None = None,
    ) -> list[Block]:
        if undone is not None:
            return make_blocks(layout, slots, device, extras_only, (undone.prompt, undone.first))
        key = ("blocks", slots, extras_only, device)
        return self._table(layout, key, lambda: make_blocks(layout, slots, device, extras_only))

    def _mlp_rows(self, state: ComponentState, weights: Mlp, ways_in: int | None = None) -> int:
        """Rows in a chunk of the MLP; ``ways_in`` under a linear rule."""
        layout, (width, n_neurons) = state.layout, weights.w_down.shape
        division = self._division(state, ways_in=ways_in)
        return division.rows(width, n_neurons, layout.n_rows, int(layout.counts.max()))

    def _groups(self, state: ComponentState, trace: MlpTrace, max_rows: int, dtype: torch.dtype) -> Groups | None:
        """Positions that do without the same neurons; None if all neurons are done everywhere."""
        costs = active.Costs.on(state.device, dtype)
        return active.make_groups(trace, state.layout, state.rows.shape[1], max_rows, costs, state.device)

    def _chunks(
        self,
        state: ComponentState,
        weights: Mlp,
        groups: Groups | None,
        undone: Chunk | None = None,
        ways_in: int | None = None,
    ) -> list[Chunk]:
        """Chunks of positions for the MLP, all of them or those from an undone one on.

        Under a linear rule (with ``ways_in``) a chunk has no more positions than coefficients are held of.
        """
        layout, device, rows, positions = state.layout, state.device, self._mlp_rows(state, weights, ways_in), None
        if ways_in is not None:
            positions = self._division(state).positions(weights.w_down.shape[1])
        if undone is not None or groups is not None:
            first = 0 if undone is None else undone.segments.start
            return make_chunks(layout, rows, device, first, groups, positions)
        make = partial(make_chunks, layout, rows, device, positions=positions)
        return self._table(layout, ("chunks", rows, positions, device), make)

    def _recorded(self, layout: Layout, trace: MlpTrace, device: torch.device) -> Recorded:
        """The rows of the trace that segments read; of a layer that all positions pass they are those of any other."""
        if trace.positions is not None:
            return Recorded.of(layout, trace, device)
        return self._table(layout, ("recorded", device), lambda: Recorded.of(layout, trace, device))

    def _neuron_blocks(self, chunk: Chunk, state: ComponentState, n: int, ways_in: int | None = None) -> list[slice]:
        """``n`` neurons in blocks that there is room for, for the rows of a chunk."""
        width, division = state.rows.shape[1], self._division(state, ways_in=ways_in)
        size = division.neurons(width, n, max(1, chunk.rows.stop - chunk.rows.start))
        return [slice(i, min(i + size, n)) for i in range(0, n, size)]


def _release(workspace: Workspace, tables: WeakKeyDictionary[Layout, dict[object, Any]]) -> None:
    """Let go of everything that is not needed to carry on."""
    workspace.clear()
    tables.clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
