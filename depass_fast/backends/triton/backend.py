"""The fused backend: Triton kernels around the library's GEMMs, over jagged rows and within a bounded workspace.

Rows are read once per product, with the frozen norm applied on the way; probabilities are made tile by tile, for all
components; the softmax over the components happens where the gates lie. Nothing waits for the device. What has no
kernel (a user's own rule, clamped values, heads wider than 512 bytes, the last layer's few queries) is inherited from
the torch backend; except for the last, which is a matter of speed alone, that is logged once.

The cost model is :mod:`.cost`: whoever changes a buffer here changes it there.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from ...adapters import Adapter, Attention, Branch, Mlp, Norm
from ...allocation import Allocation
from ...kernels import attention, probabilities, rows
from ...kernels.allocation import Segments, allocate
from ...kernels.attention import RowScales
from ...kernels.common import current, wider
from ...kernels.launch import mix_tile, takes_scales
from ...labels import BIAS, REST
from ...linear_rules import frozen_up, reads_up
from ...runtime.log import say_once
from ...runtime.products import accumulate, accumulate_block
from ...state.layout import Layout
from ...state.state import ComponentState
from ...trace.record import AttentionTrace, MlpTrace, Trace
from ..active import Groups, MlpTensors, transposed
from ..torch.adding import add_to_bias
from ..torch.backend import TorchBackend
from ..torch.linear import LinearStep
from ..torch.workspace import viewed
from .arena import Arena
from .completeness import missed
from .half import AttentionRange, MlpRange, Ranges, ranges
from .linear import linear_row_chunk
from .no_kernel import without_kernel
from .pieces import Piece, RowChunk, cut, make_piece, make_row_chunks, query_tables

_MANY_DIRECTIONS = 64  # from which a GEMM reads the state less often


class TritonBackend(TorchBackend):
    """``memory_budget`` bounds the workspace in bytes; GEMMs run in ``compute_dtype`` (default: the state's dtype).

    In float16 rows have scales of their own (:mod:`.half`), and a layer whose weights do not fit computes in bfloat16.
    ``float16``: products are in float16 where they can be, in ``compute_dtype`` elsewhere.
    """

    name = "triton"
    streamable = False
    takes_factors = False

    def __init__(
        self,
        compute_dtype: torch.dtype | None = None,
        memory_budget: int | None = None,
        float16: bool = False,
    ) -> None:
        super().__init__(compute_dtype, memory_budget)
        self._has_scales = float16 or compute_dtype == torch.float16
        self._ranges: Ranges | None = None

    def begin(self, adapter: Adapter, trace: Trace, first: int, end: int) -> None:
        super().begin(adapter, trace, first, end)
        if self._has_scales:
            self._ranges = ranges(adapter, trace, first, end)

    def _plain(self, state: ComponentState) -> torch.dtype:
        """The dtype of products without scales."""
        dtype = self._dtype(state)
        return torch.bfloat16 if dtype == torch.float16 and self._ranges is not None else dtype

    def _query_dtype(self, state: ComponentState) -> torch.dtype:
        """The state's dtype where products elsewhere have scales: the torch backend's have none."""
        return self._dtype(state) if self._ranges is None else state.rows.dtype

    # -- attention ----------------------------------------------------------------------------------------------

    def aggregate_ov(
        self,
        state: ComponentState,
        weights: Attention,
        trace: AttentionTrace,
        queries: Layout | None = None,
        source: ComponentState | None = None,
    ) -> ComponentState:
        with current(state.device):
            return super().aggregate_ov(state, weights, trace, queries, source)

    def _scaled_attention(
        self, state: ComponentState, weights: Attention, trace: AttentionTrace, longest: int
    ) -> AttentionRange | None:
        """The range of a layer's attention in float16; None: it has no scales."""
        half = (self._ranges or {}).get((state.layer, None))
        shape = (longest, max(trace.q.shape[2], weights.head_dim), weights.n_heads // weights.n_kv_heads)
        takes = takes_scales(*shape, wider(torch.float16, trace.q.dtype), state.device)
        return half if takes and isinstance(half, AttentionRange) else None

    def _aggregate_everywhere(
        self,
        state: ComponentState,
        weights: Attention,
        trace: AttentionTrace,
        extras_only: bool = False,
        source: ComponentState | None = None,
    ) -> ComponentState:
        longest = int(np.bincount(state.layout.prompt).max())
        half = self._scaled_attention(state, weights, trace, longest)
        dtype = self._plain(state) if half is None else torch.float16
        widest = wider(dtype, trace.q.dtype)
        head_bytes = trace.q.shape[-1] * widest.itemsize
        why = without_kernel(trace, head_bytes)
        if why is not None:
            say_once(f"backend: triton leaves the attention to torch: it has no kernel for {why}")
            return super()._aggregate_everywhere(state, weights, trace, extras_only, source)
        device, layout = state.device, state.layout
        frozen = probabilities.Frozen(
            trace.q.contiguous(),
            trace.k.contiguous(),
            trace.scale,
            trace.window,
            trace.softcap,
            None if trace.key_bias is None else trace.key_bias.float().contiguous(),
            trace.out_scale,
        )
        groups = frozen.groups
        tile = mix_tile(longest, groups, widest)

        def prepare() -> tuple:
            w_v, w_o = weights.w_v.to(dtype), weights.writing(weights.w_o, dtype)
            tiles, packed = query_tables(layout, tile, groups, device)
            lse = probabilities.log_sum_exp(frozen, packed, tiles, tile)
            if trace.row_sum is not None:
                lse -= trace.row_sum.log2()
            stored = None
            if self._arena(state).stores(len(frozen.q), frozen.q.shape[1], longest):
                stored = probabilities.stored_probabilities(frozen, lse, packed, tiles, tile, longest, dtype)
            return w_v, w_o, lse, stored

        w_v, w_o, lse, stored = self._budget.prepare(device, prepare)
        source = state if source is None else source
        width, values_width, mixed_width = source.rows.shape[1], len(w_v), w_o.shape[1]
        widths = Arena.attention_columns(width, values_width, mixed_width)  # of what is held at a time

        def step(piece: Piece) -> None:
            n = len(piece.rows)
            sizes = [n * columns * dtype.itemsize for columns in widths]
            one, other, *own = self._buffers(device, *sizes, *([4 * n, 4 * n] if half else []))
            scales = None
            if half is not None:
                of_values, of_mixed = (viewed(buffer, torch.float32, n) for buffer in own)
                scales = RowScales(of_values, of_mixed, half.shift)
            here, of_values = _value_scales(weights, trace, piece.positions), None if scales is None else scales.values
            x = self._read(source, piece.rows, weights, here, viewed(one, dtype, n, width), row_scale=of_values)
            values = torch.mm(x, w_v.T, out=viewed(other, dtype, n, values_width))
            mixed = viewed(one, dtype, n, mixed_width)  # x has been read
            where = (piece.keys, piece.items, frozen, lse, tile, piece.longest)
            attention.mix(values, *where, mixed, stored, scales)
            if scales is None and piece.place is not None:
                accumulate_block(piece.place.of(state.rows), mixed, w_o.T)
            else:
                gained = torch.mm(mixed, w_o.T, out=viewed(other, dtype, n, len(w_o)))
                rows.add_rows(state.rows, piece.rows, gained, None if scales is None else scales.mixed)

        def pieces(undone: Piece | None) -> list[Piece]:
            most = self._arena(state).rows(sum(widths))
            begin = (0, 0) if undone is None else (undone.prompts.start, undone.first)

            def make() -> list[Piece]:
                cuts = cut(layout, most, begin, extras_only)
                return [make_piece(layout, *part, tile, groups, device) for part in cuts]

            key = ("pieces", most, tile, groups, device, extras_only)
            return make() if undone is not None else self._table(layout, key, make)

        self._budget.each(device, pieces, step)
        return state

    # -- MLP ----------------------------------------------------------------------------------------------------

    def allocate_mlp(
        self,
        state: ComponentState,
        weights: Mlp,
        trace: MlpTrace,
        allocation: Allocation,
        source: ComponentState | None = None,
    ) -> ComponentState:
        with current(state.device):
            if not isinstance(allocation.rule, str):
                say_once("backend: triton leaves the allocation to torch: it has no kernel for a rule of your own")
                return super().allocate_mlp(state, weights, trace, allocation, source)
            if allocation.linear_rule is not None:
                return self._share_linearly(state, weights, trace, allocation.linear_rule, source or state)
            return self._allocate(state, weights, trace, allocation.rule, allocation.temperature, source)

    def _allocate(
        self,
        state: ComponentState,
        weights: Mlp,
        trace: MlpTrace,
        rule: str,
        temperature: float,
        source: ComponentState | None,
    ) -> ComponentState:
        source = state if source is None else source
        half = (self._ranges or {}).get((state.layer, trace.part))
        factor = half.factor if isinstance(half, MlpRange) else 1.0
        dtype, device, layout = torch.float16 if half else self._plain(state), state.device, state.layout
        bias, rest = layout.index(BIAS), layout.index(REST)
        groups = self._groups(state, trace, self._most_rows(state, weights), dtype)

        def prepare() -> tuple:
            packed = layout.tensor("packed", device)
            recorded = packed if trace.positions is None else trace.rows(packed)
            act = trace.act if trace.act.stride(-1) == 1 else trace.act.contiguous()  # a row's elements side by side
            if trace.out_scale is not None:
                act = act[recorded] * trace.out_scale[packed, None]
                recorded = torch.arange(len(packed), device=device)
            constant = weights.gate_constant(torch.float32) if bias is not None else None
            w_gate = weights.w_gate.to(dtype).contiguous()  # which a part of an interleaved tensor is not
            w_down = weights.writing(weights.w_down, dtype)
            scale = trace.scaled(_scales(weights.norm, trace.resid, packed), packed)
            if groups is not None:
                w_down = transposed(w_down)
            return scale, w_gate, w_down, act, recorded, constant

        scale, *tensors = self._budget.prepare(device, prepare)
        whole = MlpTensors(*tensors)

        def step(chunk: RowChunk) -> None:
            neurons = None if groups is None else groups.of(chunk.segments)
            w_gate, w_down, act, recorded, constant = whole.at(chunk.segments, neurons)
            n, n_neurons, width = chunk.n_rows, len(w_gate), state.rows.shape[1]
            arena = self._arena(state)
            size, apart = arena.neurons(n, n_neurons, width)
            sizes = arena.mlp_sizes(n, n_neurons, width)
            one, other, flags, last, _, *own = self._buffers(device, *sizes, *([4 * n] if half else []))
            x, alive = viewed(one, dtype, n, width), viewed(flags, torch.uint8, n)
            row_scale = viewed(own[0], torch.float32, n) if half else None
            self._read(source, chunk.rows, weights, scale[chunk.segments], x, alive, row_scale)
            target = state.rows[chunk.rows.first : chunk.rows.first + n]
            # several blocks are added up apart, so that the state is written to once (see budget)
            out = viewed(last, target.dtype, n, width).copy_(target) if apart else target
            segments = Segments(chunk.rows.base, recorded, chunk.longest, chunk.away, bias, rest)
            for i in range(0, n_neurons, size):
                part = slice(i, min(i + size, n_neurons))
                g = torch.mm(x, w_gate[part].T, out=viewed(other, dtype, n, part.stop - i))
                numbers = None if constant is None else constant[part]
                more = (numbers, row_scale, factor)
                allocate(g, segments, act[:, part], rule, temperature, alive, *more)
                accumulate(out, g, w_down[:, part].T, 1.0 / factor)
            if apart:
                target.copy_(out)

        self._budget.each(device, lambda undone: self._row_chunks(state, weights, groups, undone), step)
        add_to_bias(state, self._mlp_constant(state, weights, trace))
        return state

    def _share_linearly(
        self, state: ComponentState, weights: Mlp, trace: MlpTrace, rule: str, source: ComponentState
    ) -> ComponentState:
        dtype, device = self._plain(state), state.device
        ways_in = 2 if reads_up(rule, weights) else 1
        groups = None
        if rule == "taylor":  # whose coefficients vanish where the activation does
            groups = self._groups(state, trace, self._most_rows(state, weights), dtype)

        def prepare() -> LinearStep:
            packed = state.layout.tensor("packed", device)
            scale, w_up, up = trace.scaled(_scales(weights.norm, trace.resid, packed), packed), None, None
            recorded = self._recorded(state.layout, trace, device)
            if ways_in == 2:
                w_up = weights.w_up.to(dtype).contiguous()
                up = frozen_up(weights, trace, recorded.unique, dtype)
            w_gate, w_down = weights.w_gate.to(dtype).contiguous(), weights.writing(weights.w_down, dtype)
            return LinearStep(
                rule=rule,
                weights=weights,
                trace=trace,
                scale=scale,
                w_gate=w_gate,
                w_up=w_up,
                w_down=w_down if groups is None else transposed(w_down),
                recorded=recorded,
                up=up,
                out_scale=None if trace.out_scale is None else trace.out_scale[packed],
                most=self._arena(state).positions(len(w_gate)),
            )

        whole = self._budget.prepare(device, prepare)

        def share(chunk: RowChunk) -> None:
            arena, at, width = self._arena(state), whole.scale[chunk.segments], state.rows.shape[1]
            linear_row_chunk(
                state,
                chunk,
                whole,
                None if groups is None else groups.of(chunk.segments),
                arena,
                lambda n, neurons: self._buffers(device, *arena.mlp_sizes(n, neurons, width, ways_in)),
                lambda x: self._read(source, chunk.rows, weights, at, x),
            )

        self._budget.each(device, lambda undone: self._row_chunks(state, weights, groups, undone, ways_in), share)
        return state

    def _most_rows(self, state: ComponentState, weights: Mlp, ways_in: int = 1) -> int:
        """Rows in a chunk of the MLP."""
        width, n_neurons = weights.w_down.shape
        return self._arena(state).rows(width + ways_in * n_neurons)

    def _row_chunks(
        self,
        state: ComponentState,
        weights: Mlp,
        groups: Groups | None,
        undone: RowChunk | None,
        ways_in: int | None = None,
    ) -> list[RowChunk]:
        """Chunks of all neurons where a position's components allow that, so that every product is a large one.

        Under a linear rule (with ``ways_in``) a chunk has no more positions than coefficients are held of.
        """
        most, positions = self._most_rows(state, weights, ways_in or 1), None
        if ways_in is not None:
            positions = self._arena(state).positions(weights.w_down.shape[1])
        if undone is not None or groups is not None:
            first = 0 if undone is None else undone.segments.start
            return make_row_chunks(state.layout, most, state.device, first, groups, positions)
        make = partial(make_row_chunks, state.layout, most, state.device, positions=positions)
        return self._table(state.layout, ("row chunks", most, positions, state.device), make)

    # -- completeness ---------------------------------------------------------------------------------------------

    def missed(self, state: ComponentState, resid: Tensor) -> tuple[Tensor, Tensor]:
        with current(state.device):
            return missed(state, resid) or super().missed(state, resid)

    # -- the workspace ----------------------------------------------------------------------------------------------

    def _arena(self, state: ComponentState) -> Arena:
        return Arena(self._bytes(state), self._dtype(state).itemsize, state.rows.dtype.itemsize)

    def _buffers(self, device: torch.device, *sizes: int) -> list[Tensor]:
        """Return buffers of so many bytes side by side in the arena, in which attention and MLP take turns."""
        ends = np.cumsum([-(-size // 256) * 256 for size in sizes])
        like = torch.empty(0, device=device)
        arena = self._workspace.take("arena", (int(ends[-1]),), like, torch.uint8, self._budget.bytes(device))
        return [arena[end - -(-size // 256) * 256 :][:size] for end, size in zip(ends.tolist(), sizes, strict=True)]

    # -- rows -----------------------------------------------------------------------------------------------------

    def _read(
        self,
        state: ComponentState,
        which: rows.Rows,
        branch: Branch,
        scale: Tensor,
        out: Tensor,
        alive: Tensor | None = None,
        row_scale: Tensor | None = None,
    ) -> Tensor:
        """Read rows of a piece through the branch's frozen norm into ``out``; ``scale`` (S,) is s of its positions."""
        norm = branch.norm
        weight, centred = (None, False) if norm is None else (norm.weight, norm.centred)
        return rows.read_rows(state.rows, which, scale, weight, centred, out, alive, row_scale)

    def read_out(self, state: ComponentState, norm: Norm | None, resid: Tensor, directions: Tensor) -> Tensor:
        if state.rows.dtype == torch.float64 or len(directions) > _MANY_DIRECTIONS:
            return super().read_out(state, norm, resid, directions)
        with current(state.device):
            if norm is None:
                return rows.read_out(state.rows, directions.float(), None, None)
            packed = state.layout.tensor("packed", state.device)
            segment = state.layout.tensor("segment_of", state.device)
            folded = norm.fold(directions.float(), torch.empty_like(directions, dtype=torch.float32))
            return rows.read_out(state.rows, folded, segment, _scales(norm, resid, packed))


def _scales(norm: Norm | None, resid: Tensor, at: Tensor | None = None) -> Tensor:
    """s of the residual stream (T, D), or of its positions ``at`` (S,): float32; ones without a norm."""
    if norm is None or norm.is_factor:
        return resid.new_ones(len(resid if at is None else at), dtype=torch.float32)
    return rows.row_scales(resid.contiguous(), at, norm.eps, norm.centred)


def _value_scales(weights: Attention, trace: AttentionTrace, at: Tensor) -> Tensor:
    """s of the values at packed positions ``at`` (S,): of the norm before them, and of the one behind a latent."""
    scale = _scales(weights.norm, trace.resid, at)
    return scale if trace.latent_scale is None else scale * trace.latent_scale[at]
