"""The fused backend: Triton kernels around the library's GEMMs, over jagged rows and within a bounded workspace.

Rows are read once per product, with the frozen norm applied on the way; probabilities are made tile by tile, for all
components; the softmax over the components happens where the gates lie. Nothing waits for the device. What has no
kernel (a user's own rule, clamped values, the last layer's few queries) is inherited from the torch backend.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..adapters import Attention, Branch, Mlp, Norm
from ..allocation import Allocation
from ..kernels import allocation, attention, rows
from ..kernels.common import interpreted
from ..kernels.launch import mix_tile
from ..state import BIAS, REST, ComponentState, to_device
from ..trace import AttentionTrace, MlpTrace
from .mlp import accumulate
from .pieces import Piece, RowChunk, cut, make_piece, make_row_chunks, query_tiles
from .torch import TorchBackend, add_to_bias


class TritonBackend(TorchBackend):
    """``memory_budget`` bounds the workspace in bytes; GEMMs run in ``compute_dtype`` (default: the state's dtype)."""

    name = "triton"
    takes_factors = False

    # -- attention ----------------------------------------------------------------------------------------------

    def _aggregate_everywhere(
        self, state: ComponentState, weights: Attention, trace: AttentionTrace, extras_only: bool = False
    ) -> ComponentState:
        if trace.value_ratio is not None:
            return super()._aggregate_everywhere(state, weights, trace, extras_only)
        dtype, device, layout = self._dtype(state), state.device, state.layout
        frozen = attention.Frozen(
            trace.q.contiguous(),
            trace.k.contiguous(),
            trace.scale,
            trace.window,
            trace.softcap,
            None if trace.key_bias is None else trace.key_bias.float().contiguous(),
            trace.out_scale,
        )
        lengths = np.bincount(layout.prompt, minlength=len(layout.components))
        tile = mix_tile(int(lengths.max()), frozen.groups, dtype)

        def prepare() -> tuple[Tensor, ...]:
            w_v, w_o = weights.w_v.to(dtype), weights.writing(weights.w_o, dtype)
            tiles = self._plan(
                layout, ("tiles", tile, device), lambda: query_tiles(lengths, tile, frozen.groups, device)
            )
            packed = self._plan(layout, ("packed", device), lambda: to_device(layout.packed.astype(np.int32), device))
            return w_v, w_o, weights.scale(trace.resid), attention.log_sum_exp(frozen, packed, tiles, tile)

        w_v, w_o, scale, lse = self.budget.prepare(device, prepare)
        width, values_width = state.rows.shape[1], len(w_v)
        per_row = dtype.itemsize * (max(width, w_o.shape[1]) + max(width, values_width))

        def step(piece: Piece) -> None:
            x = self._read(state, piece.rows, weights, scale[piece.positions], dtype)
            values = self._workspace.take("values", (len(x), values_width), x)
            torch.mm(x, w_v.T, out=values)
            mixed = self._workspace.take("rows", (len(x), w_o.shape[1]), x)  # x is read already
            attention.mix(values, piece.keys, piece.items, frozen, lse, tile, piece.longest, mixed)
            if piece.contiguous:
                accumulate(state.rows[piece.rows.first : piece.rows.first + len(x)], mixed, w_o.T)
                return
            gained = self._workspace.take("values", (len(x), width), x)
            torch.mm(mixed, w_o.T, out=gained)
            rows.add_rows(state.rows, piece.rows, gained)

        def pieces(undone: Piece | None) -> list[Piece]:
            most = max(1, self._bytes(state) // per_row)
            begin = (0, 0) if undone is None else (undone.prompts.start, undone.first)

            def make() -> list[Piece]:
                ranges = cut(layout, most, extras_only, begin)
                return [make_piece(layout, *part, tile, frozen.groups, device) for part in ranges]

            return (
                make() if undone is not None else self._plan(layout, ("pieces", most, extras_only, device, tile), make)
            )

        self.budget.each(device, pieces, step)
        return state

    # -- MLP ----------------------------------------------------------------------------------------------------

    def allocate_mlp(
        self,
        state: ComponentState,
        weights: Mlp,
        trace: MlpTrace,
        rule: Allocation,
        source: ComponentState | None = None,
    ) -> ComponentState:
        if callable(rule.rule):
            return super().allocate_mlp(state, weights, trace, rule, source)
        source = state if source is None else source
        dtype, device, layout = self._dtype(state), state.device, state.layout
        bias, rest = layout.index(BIAS), layout.index(REST)

        def prepare() -> tuple:
            packed = layout.tensor("packed", device)
            recorded = packed if trace.positions is None else trace.rows(packed)
            act, gate, out_scale = _rowwise(trace.act), _rowwise(trace.gate), None
            if trace.out_scale is not None:
                out_scale = trace.out_scale[packed]
                act, gate = act[recorded] * out_scale[:, None], gate[recorded]
                recorded = torch.arange(len(packed), device=device)
            constant = weights.gate_constant(torch.float32) if bias is not None else None
            w_gate, w_down = weights.w_gate.to(dtype), weights.writing(weights.w_down, dtype)
            scale = weights.scale(trace.resid)[packed]
            return w_gate, w_down, act, gate, recorded, scale, constant, out_scale

        w_gate, w_down, act, gate, recorded, scale, constant, out_scale = self.budget.prepare(device, prepare)
        n_neurons = len(w_gate)

        def step(chunk: RowChunk) -> None:
            alive = self._workspace.take("alive", (chunk.n_rows,), act, torch.uint8)
            x = self._read(source, chunk.rows, weights, scale[chunk.segments], dtype, alive)
            target = state.rows[chunk.rows.first : chunk.rows.first + chunk.n_rows]
            segments = allocation.Segments(
                chunk.rows.base, recorded[chunk.segments], chunk.longest, chunk.away, bias, rest
            )
            size = self._neurons_per_block(chunk.n_rows, n_neurons, state)
            for i in range(0, n_neurons, size):
                part = slice(i, min(i + size, n_neurons))
                g = self._workspace.take("values", (chunk.n_rows, part.stop - i), x)
                torch.mm(x, w_gate[part].T, out=g)
                numbers = None if constant is None else constant[part]
                allocation.allocate(
                    g, segments, act[:, part], gate[:, part], rule.rule, rule.temperature, alive, numbers
                )
                accumulate(target, g, w_down[:, part].T)

        self.budget.each(device, lambda undone: self._row_chunks(state, n_neurons, undone), step)
        add_to_bias(state, weights.constant(state.rows.dtype, out_scale))
        return state

    def _row_chunks(self, state: ComponentState, n_neurons: int, undone: RowChunk | None) -> list[RowChunk]:
        """All neurons at once where a position's components allow that, so that every product is a large one."""
        most = max(1, self._bytes(state) // ((n_neurons + state.rows.shape[1]) * self._dtype(state).itemsize))
        if undone is not None:
            return make_row_chunks(state.layout, most, state.device, undone.segments.start)
        key = ("row chunks", most, state.device)
        return self._plan(state.layout, key, lambda: make_row_chunks(state.layout, most, state.device))

    def _neurons_per_block(self, n_rows: int, n_neurons: int, state: ComponentState) -> int:
        room = self._bytes(state) // (n_rows * self._dtype(state).itemsize) - state.rows.shape[1]
        if room >= n_neurons:
            return n_neurons
        blocks = -(-n_neurons // max(room, 64))
        return -(-n_neurons // (64 * blocks)) * 64  # what a product likes

    # -- rows -----------------------------------------------------------------------------------------------------

    def _read(
        self,
        state: ComponentState,
        which: rows.Rows,
        branch: Branch,
        scale: Tensor,
        dtype: torch.dtype,
        alive: Tensor | None = None,
    ) -> Tensor:
        """Rows of a piece through the branch's frozen norm, ``scale`` (S,) being s of its positions."""
        norm = branch.norm
        out = self._workspace.take("rows", (len(which), state.rows.shape[1]), state.rows, dtype)
        weight, centred = (None, False) if norm is None else (norm.weight, norm.centred)
        return rows.read_rows(state.rows, which, scale, weight, centred, out, alive)

    def read_out(self, state: ComponentState, norm: Norm | None, resid: Tensor, directions: Tensor) -> Tensor:
        if state.rows.dtype == torch.float64:
            return super().read_out(state, norm, resid, directions)
        if norm is None:
            return rows.read_out(state.rows, directions.float(), None, None)
        packed = state.layout.tensor("packed", state.device)
        segment = to_device(state.layout.row_segments().astype(np.int32), state.device)
        folded = norm.fold(directions.float(), torch.empty_like(directions, dtype=torch.float32))
        return rows.read_out(state.rows, folded, segment, norm.scale(resid[packed]))


def why_not(device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
    """The reason why this backend cannot run on a device, computing in a dtype; None where it can."""
    if dtype == torch.float64:
        return "its kernels compute in float32 at most"
    if interpreted():
        return None
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda":
        return f"it needs a GPU that Triton has code for, not {device.type} (TRITON_INTERPRET=1 interprets it, slowly)"
    return None


def _rowwise(x: Tensor) -> Tensor:
    """Rows whose elements lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()
