"""Fast on any device with PyTorch alone: jagged rows, P between V and O, a bounded workspace.

Attention is carried block by block of components, the MLP chunk by chunk of positions and neurons. Both are exact:
components meet only inside one position's softmax, which no chunk ever cuts (a neuron's allocation does not depend
on another neuron). So results do not depend on the block sizes beyond rounding.

The cost model is :mod:`.cost`: whoever changes a buffer here changes it there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...adapters import Attention, Branch, Mlp, Norm
from ...allocation import Allocation
from ...labels import BIAS
from ...linear_rules import reads_up
from ...runtime.products import accumulate, product, write_product
from ...runtime.transfer import to_device
from ...state.layout import Layout
from ...state.state import ComponentState
from ...trace.record import AttentionTrace, MlpTrace
from ..active import transposed
from .adding import add_everywhere, add_later, add_to_bias
from .attention import FrozenAttention, clamp_values
from .blocks import Block, Chunk, scatter
from .bounded import BoundedBackend
from .linear import LinearStep, linear_chunk
from .mixing import mixing
from .mlp import MlpStep, general_chunk, softmax_chunk
from .queries import Asked, QueryBlock, make_query_blocks, mix_queries, query_probabilities
from .sharing import SharedValues


class TorchBackend(BoundedBackend):
    """The three operations in blocks and chunks that fit into the workspace, for any device."""

    name = "torch"
    streamable = True
    takes_factors = True  # components that have just started are carried as what they are products of

    # -- attention ----------------------------------------------------------------------------------------------

    def aggregate_ov(
        self,
        state: ComponentState,
        weights: Attention,
        trace: AttentionTrace,
        queries: Layout | None = None,
        source: ComponentState | None = None,
    ) -> ComponentState:
        wide = ComponentState(state.rows, state.layout.by_position, state.layer, factors=state.factors)
        values = None if source is None else ComponentState(source.rows, source.layout.by_position, source.layer)
        rows = self._aggregate(wide, weights, trace, None if queries is None else queries.by_position, values).rows
        out = ComponentState(rows, state.layout if queries is None else queries, state.layer)
        add_to_bias(out, self._attention_constant(out, weights, trace))
        return out

    def _aggregate(
        self,
        state: ComponentState,
        weights: Attention,
        trace: AttentionTrace,
        queries: Layout | None,
        source: ComponentState | None,
    ) -> ComponentState:
        if queries is not None:
            n_prompts, n_reads, n_positions = len(queries.components), len(queries.counts), len(state.layout.counts)
            alone = max(n_prompts, n_positions // weights.n_heads)  # by itself a query costs as much as H of all
            if n_reads > alone or trace.value_ratio is not None or trace.is_mixed:
                return self._aggregate(state, weights, trace, None, source).at(queries)
            return self._aggregate_at(state, weights, trace, queries, source)
        if state.factors is not None and source is None and trace.is_plain and self.takes_factors:
            state = self._aggregate_factors(state, weights, trace)
            return self._aggregate_everywhere(state, weights, trace, extras_only=True)
        return self._aggregate_everywhere(state, weights, trace, source=source)

    def _attention_constant(self, state: ComponentState, weights: Attention, trace: AttentionTrace) -> Tensor | None:
        """The constant that `bias` receives from the attention: (D,), or (S, D), or None."""
        if state.layout.index(BIAS) is None:
            return None
        dtype, packed = state.rows.dtype, state.layout.tensor("packed", weights.w_v.device)
        if trace.value_ratio is None or trace.is_mixed:
            return trace.constant(weights, packed, dtype)
        out_scale = None if trace.out_scale is None else trace.out_scale[packed]
        return weights.written_constant(weights.o.bias, out_scale, dtype)  # V's has been with the values

    def _aggregate_everywhere(
        self,
        state: ComponentState,
        weights: Attention,
        trace: AttentionTrace,
        extras_only: bool = False,
        source: ComponentState | None = None,
    ) -> ComponentState:
        device, attend = weights.w_v.device, self._attending(state, weights, trace, source)

        def step(block: Block) -> None:
            x = self._take(state, block, device)
            attend(x, block, x if source is None else self._take(source, block, device, "source rows"))
            self._put(state, block, x)

        self._budget.each(device, lambda undone: self._blocks(state, weights, extras_only, undone, trace), step)
        return state

    def _attending(
        self, state: ComponentState, weights: Attention, trace: AttentionTrace, source: ComponentState | None = None
    ) -> Callable[[Tensor, Block, Tensor], None]:
        """Return a function that adds the attention of a block to its rows (r, D), in place and last of all.

        The rows that it takes last are those that values are read from, maybe the same.
        """
        dtype = self._dtype(state)
        scale, w_v, w_o = self._attention_weights(state, weights, trace, dtype)
        if trace.value_rule is not None:
            read = state if source is None else source
            return self._sharing_values(read, weights, trace, (scale, w_v, w_o), dtype).attend
        if trace.is_mixed:
            return mixing(state, weights, trace, (scale, w_v, w_o), dtype, self._workspace)
        frozen = self._frozen(state, trace, scale)

        def attend(x: Tensor, block: Block, read: Tensor) -> None:
            values = self._workspace.take("values", (len(x), len(w_v)), x, dtype)
            write_product(values, read.to(dtype), w_v.T)
            if trace.value_ratio is not None:
                clamp_values(values, state.layout, block, weights, trace, scale)
            accumulate(x, frozen(block.prompt).mix(values, block, self._workspace), w_o.T)

        return attend

    def _sharing_values(self, state: ComponentState, *given: Any) -> SharedValues:
        """Return what shares out the activations of values, read from a state all of whose components have been met."""
        shared = self._budget.prepare(given[0].w_v.device, lambda: SharedValues.of(state, *given))
        self._meet_values(shared, state)
        return shared

    def _meet_values(self, shared: SharedValues, state: ComponentState) -> None:
        weights, device = shared.weights, shared.act.device

        def meet(block: Block) -> None:
            shared.meet(self._take(state, block, device), block)

        self._budget.each(device, lambda undone: self._blocks(state, weights, False, undone, shared.trace), meet)

    def _attention_weights(
        self, state: ComponentState, weights: Attention, trace: AttentionTrace, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return s of all positions (T,) or (T, Hkv), W_V with the norm folded in, and W_O, both in ``dtype``."""

        def make() -> tuple[Tensor, Tensor, Tensor]:
            scale = trace.value_scale(weights, trace.resid.to(state.rows.dtype))
            return scale, self._reading("w_v", weights.w_v, weights, dtype), weights.writing(weights.w_o, dtype)

        return self._budget.prepare(weights.w_v.device, make)

    def _aggregate_factors(self, state: ComponentState, weights: Attention, trace: AttentionTrace) -> ComponentState:
        """Carry components that have just started as products of numbers and vectors: V and O see only the vectors.

        That is one row per component, instead of one per component and position.
        """
        dtype, width, factors = self._dtype(state), state.rows.shape[1], state.factors
        assert factors is not None
        groups = weights.n_heads // weights.n_kv_heads
        scale, w_v, w_o = self._attention_weights(state, weights, trace, dtype)
        w_o = w_o.unflatten(1, (weights.n_heads, -1)).permute(1, 2, 0)  # (H, d, D)
        frozen = self._frozen(state, trace, scale)

        def cut(undone: tuple[int, slice] | None) -> list[tuple[int, slice]]:
            parts, (begun, at) = [], undone or (0, slice(0, 0))
            for prompt in range(begun, len(factors)):
                last, n = len(factors[prompt].vectors), len(state.layout.counts[state.layout.segments(prompt)])
                later = factors[prompt].coefficients is None
                size = self._division(state).products(width, weights.n_heads, n, later)
                first = at.start if prompt == begun else 0
                parts += [(prompt, slice(i, min(i + size, last))) for i in range(first, last, size)]
            return parts

        def step(piece: tuple[int, slice]) -> None:
            prompt, part = piece
            numbers, vectors = factors[prompt].coefficients, factors[prompt].vectors[part]
            values = (vectors.to(state.device, dtype) @ w_v.T).unflatten(1, (weights.n_kv_heads, 1, -1))
            values = values.expand(-1, -1, groups, -1).flatten(1, 2).transpose(0, 1)  # (B, Hkv, 1, d) -> (H, B, d)
            writes = torch.bmm(values, w_o)
            if numbers is None:
                add_later(state, prompt, part, frozen(prompt).spread(writes, None, part.start))
            else:
                numbers = numbers[:, part].to(state.device, dtype)
                add_everywhere(state, prompt, part, frozen(prompt).spread(writes, numbers, 0))

        self._budget.each(state.device, cut, step)
        return state

    def _reading(self, name: str, weight: Tensor, branch: Branch, dtype: torch.dtype) -> Tensor:
        """``weight`` (out, D) with the norm's γ in its columns, in the workspace."""
        return branch.reading(weight, dtype, self._workspace.take(name, weight.shape, weight, dtype))

    def _take(self, state: ComponentState, block: Block, device: torch.device, name: str = "rows") -> Tensor:
        """Return a block's rows: a view of neighbours, else a copy in the workspace, under that ``name``."""
        rows, index = state.rows, block.rows
        if isinstance(index, slice):
            return rows[index]
        return torch.index_select(rows, 0, index, out=self._workspace.take(name, (len(index), rows.shape[1]), rows))

    def _put(self, state: ComponentState, block: Block, changed: Tensor) -> None:
        """Write back what :meth:`_take` gave: nothing to do for a view."""
        if not isinstance(block.rows, slice):
            state.rows.index_copy_(0, block.rows, changed)

    def _frozen(self, state: ComponentState, trace: AttentionTrace, scale: Tensor) -> Callable[[int], FrozenAttention]:
        """Return a function that gives P of a prompt; the last is kept as long as the workspace keeps its size."""
        kept: dict[tuple[int, int], FrozenAttention] = {}

        def make(prompt: int) -> FrozenAttention:
            key = (prompt, self._bytes(state))
            if key not in kept:
                kept.clear()
                packed = state.layout.packed[state.layout.segments(prompt)]
                keys = slice(int(packed[0]), int(packed[-1]) + 1)
                tile = self._division(state).tile(scale.dtype.itemsize)
                kept[key] = FrozenAttention(trace, keys, scale, tile, self._dtype(state))
            return kept[key]

        return make

    def _query_dtype(self, state: ComponentState) -> torch.dtype:
        """The dtype of the products for a few queries."""
        return self._dtype(state)

    def _aggregate_at(
        self,
        state: ComponentState,
        weights: Attention,
        trace: AttentionTrace,
        queries: Layout,
        source: ComponentState | None,
    ) -> ComponentState:
        """Compute only a few queries: P first, on the states themselves, then V and O on what is left of them."""
        if self._computes_on(state).type != "cpu":  # where new buffers cost nothing; kept ones would add to the peak
            self._workspace.clear()
        dtype, layout = self._query_dtype(state), state.layout
        width = (source or state).rows.shape[1]
        scale, w_v, w_o = self._attention_weights(state, weights, trace, dtype)
        w_v, device = w_v.view(weights.n_kv_heads, weights.head_dim, width), weights.w_v.device
        rows = self._budget.prepare(state.device, lambda: state.rows.new_zeros(queries.n_rows, state.rows.shape[1]))
        out = ComponentState(rows, queries, state.layer)
        kept: dict[Asked, Tensor] = {}  # P of the last queries, for the next components of the same prompt

        def step(block: QueryBlock) -> None:
            x = scatter(self._take(source or state, block, device).to(dtype), block)
            x = x.view(block.n_prompts, -1, block.n_components * width)  # (S, K, B·D)
            for one in block.rounds:
                if one.asked not in kept:
                    kept.clear()
                    kept[one.asked] = query_probabilities(trace, one.asked, scale, dtype)
                z = mix_queries(kept[one.asked][..., block.start :], x if one.members is None else x[one.members])
                y = torch.bmm(z.view(weights.n_kv_heads, -1, width), w_v.transpose(1, 2))  # (Hkv, G·S·B, d)
                y = y.view(weights.n_heads, -1, weights.head_dim).transpose(0, 1).flatten(1)  # (S·B, H·d)
                if trace.out_ratio is not None:
                    ratio = trace.out_ratio[one.asked.at].to(y)  # (S, H·d)
                    y = (y.view(len(ratio), -1, ratio.shape[1]) * ratio[:, None]).flatten(0, 1)
                y = y @ w_o.T  # (S·B, D)
                y = (y if one.made is None else y[one.made]).to(state.device)
                out.rows[one.target] = state.rows[one.residual] + y

        fewest = int(np.bincount(layout.prompt).min())

        def cut(undone: QueryBlock | None) -> list[QueryBlock]:
            slots = self._division(state, dtype).query_slots(width, len(w_o.T), weights.n_heads, fewest)
            slots, begin = min(slots, self._slots(state, weights)), (0, 0)
            if undone is not None:
                begin = undone.prompt, undone.first
            return make_query_blocks(layout, queries, slots, trace, (device, state.device), begin)

        self._budget.each(device, cut, step)
        return out

    # -- MLP ----------------------------------------------------------------------------------------------------

    def allocate_mlp(
        self,
        state: ComponentState,
        weights: Mlp,
        trace: MlpTrace,
        allocation: Allocation,
        source: ComponentState | None = None,
    ) -> ComponentState:
        source = state if source is None else source
        if allocation.linear_rule is not None:
            return self._share_linearly(state, weights, trace, allocation.linear_rule, source)
        groups = self._groups(state, trace, self._mlp_rows(state, weights), self._dtype(state))

        def make() -> MlpStep:
            whole = self._mlp_step(state, weights, trace, allocation, state.device)
            return whole if groups is None else replace(whole, w_down=transposed(whole.w_down))

        whole = self._budget.prepare(state.device, make)

        def step(chunk: Chunk) -> None:
            parts = whole if groups is None else whole.only(groups.of(chunk.segments), self._workspace)
            neurons = self._neuron_blocks(chunk, state, len(parts.w_gate))
            if not (allocation.is_softmax and softmax_chunk(state, source, chunk, parts, neurons, self._workspace)):
                general_chunk(state, source, chunk, parts, neurons)

        self._budget.each(state.device, lambda undone: self._chunks(state, weights, groups, undone), step)
        add_to_bias(state, self._mlp_constant(state, weights, trace))
        return state

    def _share_linearly(
        self, state: ComponentState, weights: Mlp, trace: MlpTrace, rule: str, source: ComponentState
    ) -> ComponentState:
        groups, ways_in = None, 2 if reads_up(rule, weights) else 1
        if rule == "taylor":  # whose coefficients vanish where the activation does
            groups = self._groups(state, trace, self._mlp_rows(state, weights, ways_in), self._dtype(state))

        def make() -> LinearStep:
            whole = self._linear_step(state, weights, trace, rule, state.device)
            return whole if groups is None else replace(whole, w_down=transposed(whole.w_down))

        whole = self._budget.prepare(state.device, make)

        def share(chunk: Chunk) -> None:
            active = None if groups is None else groups.of(chunk.segments)
            neurons = self._neuron_blocks(chunk, state, len(whole.w_gate) if active is None else len(active), ways_in)
            linear_chunk(state, source, chunk, whole, active, neurons, self._workspace)

        self._budget.each(state.device, lambda undone: self._chunks(state, weights, groups, undone, ways_in), share)
        return state

    def _linear_step(
        self, state: ComponentState, weights: Mlp, trace: MlpTrace, rule: str, device: torch.device
    ) -> LinearStep:
        """Prepare the MLP of a layer for the state's segments, under a linear rule."""
        dtype, packed = self._dtype(state), state.layout.tensor("packed", device)
        recorded, w_up, up = self._recorded(state.layout, trace, device), None, None
        scale = trace.scaled(weights.scale(trace.resid[packed].to(state.rows.dtype)), packed)
        if reads_up(rule, weights):
            w_up = self._reading("w_up", weights.w_up, weights, dtype)
            at = recorded.positions(trace)
            resid = trace.resid[at].to(state.rows.dtype)
            read = (resid * trace.scaled(weights.scale(resid), at)[:, None].to(resid)).to(dtype)
            up, constant = product(read, w_up.T), weights.up_constant(dtype)
            up = up if constant is None else up + constant
        w_down = weights.writing(weights.w_down, dtype)
        w_gate = self._reading("w_gate", weights.w_gate, weights, dtype)
        out_scale = None if trace.out_scale is None else trace.out_scale[packed]
        most = self._division(state).positions(len(w_gate))
        return LinearStep(rule, weights, trace, scale, w_gate, w_up, w_down, recorded, up, out_scale, most)

    def _mlp_constant(self, state: ComponentState, weights: Mlp, trace: MlpTrace) -> Tensor | None:
        """The constant that `bias` receives from the MLP: (D,), or (S, D), or None."""
        if state.layout.index(BIAS) is None:
            return None
        dtype, packed = state.rows.dtype, state.layout.tensor("packed", weights.gate.device)
        out_scale = None if trace.out_scale is None else trace.out_scale[packed]
        return weights.written_constant(trace.constant(weights, packed, dtype), out_scale, dtype)

    def _mlp_step(
        self, state: ComponentState, weights: Mlp, trace: MlpTrace, allocation: Allocation, device: torch.device
    ) -> MlpStep:
        """Prepare the MLP of a layer for the state's segments."""
        dtype, layout = self._dtype(state), state.layout
        packed = layout.tensor("packed", device)
        everywhere = trace.positions is None and np.array_equal(layout.packed, np.arange(len(trace.resid)))
        recorded = slice(None) if everywhere else trace.rows(packed)  # a view, or a copy
        act = trace.act[recorded].to(dtype)
        if trace.out_scale is not None:
            act = act * trace.out_scale[packed, None].to(dtype)
        return MlpStep(
            scale=trace.scaled(weights.scale(trace.resid[packed].to(state.rows.dtype)), packed),
            w_gate=self._reading("w_gate", weights.w_gate, weights, dtype),
            w_down=weights.writing(weights.w_down, dtype),
            gate_constant=weights.gate_constant(dtype) if layout.index(BIAS) is not None else None,
            act=act,
            gate=trace.gate[recorded],
            allocation=allocation,
        )

    # -- readout ------------------------------------------------------------------------------------------------

    def read_out(self, state: ComponentState, norm: Norm | None, resid: Tensor, directions: Tensor) -> Tensor:
        directions = directions.to(state.rows.dtype)
        if norm is None:
            return state.rows @ directions.T
        segment = to_device(state.layout.row_segments(), state.device)
        packed = state.layout.tensor("packed", state.device)
        scale = norm.scale(resid[packed].to(state.rows.dtype))[segment]
        return state.rows @ norm.fold(directions, torch.empty_like(directions)).T * scale[:, None]
