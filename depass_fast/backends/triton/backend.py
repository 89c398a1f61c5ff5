"""The fused backend: Triton kernels around the library's GEMMs, over jagged rows and within a bounded workspace.

Rows are read once per product, with the frozen norm applied on the way; probabilities are made tile by tile, for all
components; the softmax over the components happens where the gates lie. Nothing waits for the device. What has no
kernel (a user's own rule, clamped values, heads wider than 512 bytes, the last layer's few queries) is inherited from
the torch backend; except for the last, which is a matter of speed alone, that is logged once.

The cost model is :mod:`.cost`: whoever changes a buffer here changes it there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from math import prod

import numpy as np
import torch
from torch import Tensor
from triton import knobs

from ...adapters import Attention, Branch, Mlp, Norm
from ...allocation import Allocation
from ...kernels import attention, rows
from ...kernels.allocation import Segments, allocate
from ...kernels.common import interpreted
from ...kernels.launch import mix_tile
from ...labels import BIAS, REST
from ...runtime.log import say_once
from ...runtime.transfer import to_device
from ...state.layout import Layout
from ...state.state import ComponentState
from ...trace.record import AttentionTrace, MlpTrace
from ..torch.backend import TorchBackend, add_to_bias
from ..torch.mlp import accumulate
from .arena import Arena
from .pieces import Piece, RowChunk, cut, make_piece, make_row_chunks, query_tiles

_WIDEST_HEAD = 512  # bytes, beyond which a tile of keys and values does not fit into registers
_MANY_DIRECTIONS = 64  # from which a GEMM reads the state less often
_AMD = ("gfx942",)


class TritonBackend(TorchBackend):
    """``memory_budget`` bounds the workspace in bytes; GEMMs run in ``compute_dtype`` (default: the state's dtype)."""

    name = "triton"
    streamable = False
    takes_factors = False

    # -- attention ----------------------------------------------------------------------------------------------

    def aggregate_ov(
        self, state: ComponentState, weights: Attention, trace: AttentionTrace, queries: Layout | None = None
    ) -> ComponentState:
        with _current(state.device):
            return super().aggregate_ov(state, weights, trace, queries)

    def _aggregate_everywhere(
        self, state: ComponentState, weights: Attention, trace: AttentionTrace, extras_only: bool = False
    ) -> ComponentState:
        widest = torch.promote_types(self._dtype(state), trace.q.dtype)
        head_bytes = trace.q.shape[-1] * widest.itemsize
        if trace.value_ratio is not None or head_bytes > _WIDEST_HEAD:
            why = f"heads of {head_bytes} bytes" if head_bytes > _WIDEST_HEAD else "values that the model clamps"
            say_once(f"backend: triton leaves the attention to torch: it has no kernel for {why}")
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
        lengths, groups = np.bincount(layout.prompt, minlength=len(layout.components)), frozen.groups
        tile = mix_tile(int(lengths.max()), groups, widest)

        def prepare() -> tuple[Tensor, ...]:
            w_v, w_o = weights.w_v.to(dtype), weights.writing(weights.w_o, dtype)
            key = ("tiles", tile, groups, device)
            tiles = self._table(layout, key, lambda: query_tiles(lengths, tile, groups, device))
            packed = self._table(layout, ("packed", device), lambda: to_device(layout.packed.astype(np.int32), device))
            lse = attention.log_sum_exp(frozen, packed, tiles, tile)
            if trace.row_sum is not None:
                lse -= trace.row_sum.log2()
            scale = _scales(weights.norm, trace.resid)
            return w_v, w_o, scale if trace.latent_scale is None else scale * trace.latent_scale, lse

        w_v, w_o, scale, lse = self._budget.prepare(device, prepare)
        width, values_width, mixed_width = state.rows.shape[1], len(w_v), w_o.shape[1]
        widths = Arena.attention_columns(width, values_width, mixed_width)  # of what is held at a time

        def step(piece: Piece) -> None:
            n = len(piece.rows)
            one, other = self._buffers(device, *(n * columns * dtype.itemsize for columns in widths))
            x = self._read(state, piece.rows, weights, scale[piece.positions], _as(one, dtype, n, width))
            values = torch.mm(x, w_v.T, out=_as(other, dtype, n, values_width))
            mixed = _as(one, dtype, n, mixed_width)  # x has been read
            attention.mix(values, piece.keys, piece.items, frozen, lse, tile, piece.longest, mixed)
            if piece.contiguous:
                accumulate(state.rows[piece.rows.first : piece.rows.first + n], mixed, w_o.T)
            else:
                rows.add_rows(state.rows, piece.rows, torch.mm(mixed, w_o.T, out=_as(other, dtype, n, width)))

        def pieces(undone: Piece | None) -> list[Piece]:
            most = self._arena(state).rows(sum(widths))
            begin = (0, 0) if undone is None else (undone.prompts.start, undone.first)

            def make() -> list[Piece]:
                ranges = cut(layout, most, begin, extras_only)
                return [make_piece(layout, *part, tile, groups, device) for part in ranges]

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
        with _current(state.device):
            if not isinstance(allocation.rule, str):
                say_once("backend: triton leaves the allocation to torch: it has no kernel for a rule of your own")
                return super().allocate_mlp(state, weights, trace, allocation, source)
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
        dtype, device, layout = self._dtype(state), state.device, state.layout
        bias, rest = layout.index(BIAS), layout.index(REST)

        def prepare() -> tuple:
            packed = layout.tensor("packed", device)
            recorded = packed if trace.positions is None else trace.rows(packed)
            act, gate = _rowwise(trace.act), _rowwise(trace.gate)
            if trace.out_scale is not None:
                act, gate = act[recorded] * trace.out_scale[packed, None], gate[recorded]
                recorded = torch.arange(len(packed), device=device)
            constant = weights.gate_constant(torch.float32) if bias is not None else None
            w_gate = weights.w_gate.to(dtype).contiguous()  # which a part of an interleaved tensor is not
            w_down = weights.writing(weights.w_down, dtype)
            scale = _scales(weights.norm, trace.resid, packed)
            return w_gate, w_down, act, gate, recorded, scale, constant

        w_gate, w_down, act, gate, recorded, scale, constant = self._budget.prepare(device, prepare)
        n_neurons = len(w_gate)

        def step(chunk: RowChunk) -> None:
            n, width = chunk.n_rows, state.rows.shape[1]
            arena = self._arena(state)
            size, apart = arena.neurons(n, n_neurons, width)
            one, other, flags, last = self._buffers(device, *arena.mlp_sizes(n, n_neurons, width))
            x, alive = _as(one, dtype, n, width), _as(flags, torch.uint8, n)
            self._read(source, chunk.rows, weights, scale[chunk.segments], x, alive)
            target = state.rows[chunk.rows.first : chunk.rows.first + n]
            # several blocks are added up apart, so that the state is written to once (see budget)
            out = _as(last, target.dtype, n, width).copy_(target) if apart else target
            segments = Segments(chunk.rows.base, recorded[chunk.segments], chunk.longest, chunk.away, bias, rest)
            for i in range(0, n_neurons, size):
                part = slice(i, min(i + size, n_neurons))
                g = torch.mm(x, w_gate[part].T, out=_as(other, dtype, n, part.stop - i))
                numbers = None if constant is None else constant[part]
                allocate(g, segments, act[:, part], gate[:, part], rule, temperature, alive, numbers)
                accumulate(out, g, w_down[:, part].T)
            if apart:
                target.copy_(out)

        self._budget.each(device, lambda undone: self._row_chunks(state, n_neurons, undone), step)
        add_to_bias(state, self._mlp_constant(state, weights, trace))
        return state

    def _row_chunks(self, state: ComponentState, n_neurons: int, undone: RowChunk | None) -> list[RowChunk]:
        """Chunks of all neurons where a position's components allow that, so that every product is a large one."""
        most = self._arena(state).rows(n_neurons + state.rows.shape[1])
        if undone is not None:
            return make_row_chunks(state.layout, most, state.device, undone.segments.start)
        key = ("row chunks", most, state.device)
        return self._table(state.layout, key, lambda: make_row_chunks(state.layout, most, state.device))

    # -- the workspace ----------------------------------------------------------------------------------------------

    def _arena(self, state: ComponentState) -> Arena:
        return Arena(self._bytes(state), self._dtype(state).itemsize, state.rows.dtype.itemsize)

    def _buffers(self, device: torch.device, *sizes: int) -> list[Tensor]:
        """Return buffers of so many bytes side by side in the arena, in which attention and MLP take turns."""
        ends = np.cumsum([-(-size // 256) * 256 for size in sizes])
        arena = self._workspace.take("arena", (int(ends[-1]),), torch.empty(0, device=device), torch.uint8)
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
    ) -> Tensor:
        """Read rows of a piece through the branch's frozen norm into ``out``; ``scale`` (S,) is s of its positions."""
        norm = branch.norm
        weight, centred = (None, False) if norm is None else (norm.weight, norm.centred)
        return rows.read_rows(state.rows, which, scale, weight, centred, out, alive)

    def read_out(self, state: ComponentState, norm: Norm | None, resid: Tensor, directions: Tensor) -> Tensor:
        if state.rows.dtype == torch.float64 or len(directions) > _MANY_DIRECTIONS:
            return super().read_out(state, norm, resid, directions)
        with _current(state.device):
            if norm is None:
                return rows.read_out(state.rows, directions.float(), None, None)
            packed = state.layout.tensor("packed", state.device)
            segment = state.layout.tensor("segment_of", state.device)
            folded = norm.fold(directions.float(), torch.empty_like(directions, dtype=torch.float32))
            return rows.read_out(state.rows, folded, segment, _scales(norm, resid, packed))


def why_not(device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Return the reason why this backend cannot run on a device, computing in a dtype; None where it can."""
    if dtype == torch.float64:
        return "its kernels compute in float32 at most"
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if interpreted():
        return None if device.type == "cpu" else "TRITON_INTERPRET is set, with which kernels run on the CPU"
    if device.type != "cuda":
        return f"it needs a GPU that Triton has code for, not {device.type} (TRITON_INTERPRET=1 interprets it, slowly)"
    about = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        arch = about.gcnArchName.split(":")[0]
        if arch not in _AMD:
            return f"its kernels are compiled for {' and '.join(_AMD)}, not for {arch}"
    elif about.major < 8:
        return f"its kernels need a GPU of capability 8.0, and this one's is {about.major}.{about.minor}"
    return _no_compiler()


def _no_compiler() -> str | None:
    """Return the reason why Triton cannot compile the C code that launches a kernel; None where it can.

    It looks in this order (triton/runtime/build.py): a builder of one's own, the variable CC, gcc, clang.
    """
    if getattr(knobs.build, "impl", None) is not None:
        return None
    named = os.environ.get("CC")
    if named is not None:
        return (
            None
            if shutil.which(named)
            else f"Triton needs a C compiler, and the one that CC names, {named!r}, is not there"
        )
    if shutil.which("gcc") or shutil.which("clang"):
        return None
    return "Triton needs a C compiler to launch its kernels; install gcc or clang, or name one in the variable CC"


@contextmanager
def _current(device: torch.device) -> Iterator[None]:
    """Make ``device`` the current one: Triton launches there."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        yield


def _scales(norm: Norm | None, resid: Tensor, at: Tensor | None = None) -> Tensor:
    """s of the residual stream (T, D), or of its positions ``at`` (S,): float32; ones without a norm."""
    if norm is None:
        return resid.new_ones(len(resid if at is None else at), dtype=torch.float32)
    return rows.row_scales(resid.contiguous(), at, norm.eps, norm.centred)


def _as(buffer: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    """View the beginning of a buffer of bytes as a tensor."""
    return buffer[: prod(shape) * dtype.itemsize].view(dtype).view(shape)


def _rowwise(x: Tensor) -> Tensor:
    """Return x with the elements of every row side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()
