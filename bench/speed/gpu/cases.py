"""Every kernel at production widths, in the shapes that chunks of real workloads have: inputs, oracle, bytes.

The oracles are plain float64 on the same device: the inputs are far too large for a CPU. Corners (special tokens,
biases, windows, odd sizes) are the business of :mod:`bench.kernels`, at small sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from depass_fast.backends.triton.pieces import make_piece, query_tiles
from depass_fast.kernels import allocation, attention, launch, probabilities, rows
from depass_fast.state.layout import Components, Layout
from depass_fast.state.state import ComponentState
from depass_fast.trace.attention import attention_probabilities
from depass_fast.trace.record import AttentionTrace

from ...kernels.checking import everywhere, poisoned, tokens


@dataclass(frozen=True)
class Sizes:
    """Widths of a model, and how many components and positions a case has."""

    width: int = 4096
    neurons: int = 11008
    heads: int = 32
    head_dim: int = 128
    positions: int = 3  # of a chunk that carries all neurons of a layer
    length: int = 512  # of a long prompt
    part: tuple[int, int] = (64, 192)  # its components in one piece
    many: int = 1600  # components everywhere, in one piece of a short prompt
    some: int = 60  # positions with `length` components
    few: int = 600  # positions with 21 components


TINY = Sizes(40, 48, 4, 16, 2, 9, (2, 6), 7, 3, 5)
SANITIZED = Sizes(512, 704, 4, 64, 2, 96, (8, 40), 65, 6, 9)


@dataclass(frozen=True)
class Prepared:
    """A kernel's call on inputs that lie on the device.

    ``run`` takes the output, which it writes or changes in place, or nothing, where it returns a new one; ``start`` is
    such an output as it must be before. ``moved`` are the least bytes, ``flops`` the useful operations of products.
    """

    run: Callable[[Tensor], Tensor]
    start: Callable[[], Tensor]
    oracle: Callable[[], Tensor]
    moved: float
    flops: float = 0.0


@dataclass(frozen=True)
class KernelCase:
    """A kernel, the shape that it is called with, and the inputs in a dtype."""

    kernel: str
    name: str
    make: Callable[[torch.dtype, torch.device], Prepared]


def kernel_cases(sizes: Sizes) -> list[KernelCase]:
    """The cases, in the order of a layer."""
    chunk, positions = sizes.neurons + 1, sizes.positions
    part = f"{sizes.part[0]} to {sizes.part[1]} of N={sizes.length}"
    return [
        KernelCase("row_scales", f"{4 * sizes.length} positions", lambda *at: _row_scales(sizes, *at)),
        KernelCase("read_rows", f"{positions} x {chunk}", lambda *at: _read_rows(sizes, False, *at)),
        KernelCase("read_rows", f"tokens {part}", lambda *at: _read_rows(sizes, True, *at)),
        KernelCase("log_sum_exp", f"N={sizes.length}", lambda *at: _log_sum_exp(sizes, *at)),
        KernelCase("mix", f"{sizes.many} neurons, N=20", lambda *at: _mix(sizes, False, 1, *at)),
        KernelCase("mix", f"tokens {part}", lambda *at: _mix(sizes, True, 1, *at)),
        KernelCase("mix", f"tokens {part}, 4 heads a key", lambda *at: _mix(sizes, True, 4, *at)),
        KernelCase("add_rows", f"tokens {part}", lambda *at: _add_rows(sizes, *at)),
        KernelCase("allocate", f"{positions} x {chunk}", lambda *at: _allocate(sizes, positions, chunk, *at)),
        KernelCase(
            "allocate", f"{sizes.some} x {sizes.length}", lambda *at: _allocate(sizes, sizes.some, sizes.length, *at)
        ),
        KernelCase("allocate", f"{sizes.few} x 21", lambda *at: _allocate(sizes, sizes.few, 21, *at)),
        KernelCase("read_out", f"{positions} x {chunk}", lambda *at: _read_out(sizes, *at)),
        KernelCase("completeness", f"{positions} x {chunk}", lambda *at: _completeness(sizes, *at)),
    ]


def _random(seed: int, *shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device).to(dtype)


def _long(sizes: Sizes) -> Layout:
    return tokens([sizes.length])


def _short(sizes: Sizes) -> Layout:
    return everywhere([20], sizes.many)


def _chunk(sizes: Sizes) -> Layout:
    """All neurons of a layer, at as many positions as a chunk has."""
    named = Components.everywhere(tuple(map(str, range(sizes.neurons))), ("rest",))
    return Layout.of((named,), np.array([0, sizes.positions]))


def _row_scales(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Prepared:
    x = _random(0, 4 * sizes.length, sizes.width, device=device, dtype=dtype)
    return Prepared(
        run=lambda _: rows.row_scales(x, None, 1e-5, False),
        start=lambda: poisoned(len(x), dtype=torch.float32, device=device),
        oracle=lambda: torch.rsqrt(x.double().square().mean(1) + 1e-5),
        moved=x.numel() * x.itemsize + 4 * len(x),
    )


def _piece(sizes: Sizes, gathered: bool, device: torch.device, groups: int = 1, tile: int = 16):
    """A piece with the rows of the state that it holds: the components ``part`` of a long prompt, or a whole chunk."""
    layout = _long(sizes) if gathered else _chunk(sizes)
    piece = make_piece(layout, range(1), *(sizes.part if gathered else (0, None)), tile, groups, device)
    first = piece.rows.first if piece.rows.source is None else piece.rows.source - piece.rows.base[:-1]
    at = torch.arange(len(piece.rows), device=device)
    return layout, piece, at + (first if isinstance(first, int) else first[piece.rows.segment.long()])


def _read_rows(sizes: Sizes, gathered: bool, dtype: torch.dtype, device: torch.device) -> Prepared:
    layout, piece, source = _piece(sizes, gathered, device)
    x, weight = (
        _random(i, *shape, device=device) for i, shape in enumerate([(layout.n_rows, sizes.width), (sizes.width,)])
    )
    weight = weight.to(dtype)
    scale = _random(2, len(piece.positions), device=device).abs() + 0.5
    alive = torch.empty(len(piece.rows), dtype=torch.uint8, device=device)
    return Prepared(
        run=lambda out: rows.read_rows(x, piece.rows, scale, weight, False, out, alive),
        start=lambda: poisoned(len(source), sizes.width, dtype=dtype, device=device),
        oracle=lambda: x[source].double() * scale[piece.rows.segment.long(), None] * weight.double(),
        moved=len(source) * sizes.width * (4 + dtype.itemsize),
    )


def _add_rows(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Prepared:
    layout, piece, source = _piece(sizes, True, device)
    x = _random(0, layout.n_rows, sizes.width, device=device)
    gained = _random(1, len(source), sizes.width, device=device, dtype=dtype)

    def run(out: Tensor) -> Tensor:
        rows.add_rows(out, piece.rows, gained)
        return out

    return Prepared(
        run=run,
        start=x.clone,
        oracle=lambda: x.double().index_add_(0, source, gained.double()),
        moved=gained.numel() * (8 + dtype.itemsize),
    )


def _read_out(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Prepared:
    layout = _chunk(sizes)
    x, direction = (_random(i, n, sizes.width, device=device) for i, n in enumerate((layout.n_rows, 1)))
    scale, segment = _random(2, sizes.positions, device=device), layout.tensor("segment_of", device)
    return Prepared(
        run=lambda _: rows.read_out(x, direction, segment, scale),
        start=lambda: poisoned(len(x), 1, dtype=torch.float32, device=device),
        oracle=lambda: x.double() @ direction.double().T * scale.double()[segment.long(), None],
        moved=4.0 * x.numel(),
    )


def _allocate(sizes: Sizes, segments: int, count: int, dtype: torch.dtype, device: torch.device) -> Prepared:
    gates = _random(0, segments * count, sizes.neurons, device=device).mul_(0.05).to(dtype)
    act = _random(1, segments, sizes.neurons, device=device, dtype=dtype)
    starts = torch.arange(segments + 1, device=device) * count
    where = allocation.Segments(starts, torch.arange(segments, device=device), count)
    alive = torch.ones(len(gates), dtype=torch.uint8, device=device)

    def run(out: Tensor) -> Tensor:
        allocation.allocate(out, where, act, "softmax", 0.1, alive)
        return out

    def oracle() -> Tensor:
        z = gates.view(segments, count, -1).double().div_(0.1)
        return torch.softmax(z, 1).mul_(act.double()[:, None]).view(gates.shape)

    return Prepared(run, gates.clone, oracle, moved=3.0 * gates.numel() * dtype.itemsize)


def _frozen(
    layout: Layout, sizes: Sizes, groups: int, dtype: torch.dtype, device: torch.device
) -> tuple[probabilities.Frozen, Tensor, Tensor, int]:
    """A recorded attention, its log-sum-exp's positions and items, and the rows of a tile."""
    lengths = np.bincount(layout.prompt)
    tile = launch.mix_tile(int(lengths.max()), groups, dtype)
    q, k = (
        _random(i, len(layout.packed), h, sizes.head_dim, device=device, dtype=dtype)
        for i, h in enumerate((sizes.heads, sizes.heads // groups))
    )
    packed = torch.from_numpy(layout.packed.astype(np.int32)).to(device)
    return (
        probabilities.Frozen(q, k, sizes.head_dim**-0.5),
        packed,
        query_tiles(lengths, tile, groups, device),
        tile,
    )


def _log_sum_exp(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Prepared:
    frozen, packed, items, tile = _frozen(_long(sizes), sizes, 1, dtype, device)

    def oracle() -> Tensor:
        logits = torch.einsum("qhd,khd->hqk", frozen.q.double(), frozen.k.double()) * frozen.scale
        unseen = torch.ones(logits.shape[1:], dtype=torch.bool, device=device).triu_(1)
        return (torch.logsumexp(logits.masked_fill_(unseen, -torch.inf), 2) / np.log(2)).T

    n = len(packed)
    return Prepared(
        run=lambda _: probabilities.log_sum_exp(frozen, packed, items, tile),
        start=lambda: poisoned(n, sizes.heads, dtype=torch.float32, device=device),
        oracle=oracle,
        moved=2.0 * frozen.q.numel() * dtype.itemsize,
        flops=n * (n + 1) * sizes.heads * sizes.head_dim,
    )


def _mix(sizes: Sizes, is_long: bool, groups: int, dtype: torch.dtype, device: torch.device) -> Prepared:
    layout = _long(sizes) if is_long else _short(sizes)
    frozen, packed, items, tile = _frozen(layout, sizes, groups, dtype, device)
    part = sizes.part if is_long else (0, None)
    piece = make_piece(layout, range(1), *part, tile, groups, device)
    lse = probabilities.log_sum_exp(frozen, packed, items, tile)
    kv, wide = sizes.heads // groups, sizes.heads * sizes.head_dim
    values = _random(2, len(piece.rows), kv * sizes.head_dim, device=device, dtype=dtype)
    first, last = part[0], len(layout.components[0]) if part[1] is None else part[1]
    births = np.searchsorted(layout.counts, np.arange(first, last), side="right")
    lengths = len(layout.counts) - births  # positions of every component

    def oracle() -> Tensor:
        trace = AttentionTrace(resid=frozen.q, q=frozen.q, k=frozen.k, scale=frozen.scale)
        n = len(packed)
        here = torch.arange(n, device=device)
        p = attention_probabilities(trace, here, here, torch.float64)  # (H, q, k)
        at = int(births.min())
        count = (piece.rows.base[1:] - piece.rows.base[:-1])[:, None]
        alive = torch.arange(last - first, device=device) < count  # (n', M)
        dense = values.new_zeros(*alive.shape, values.shape[1])
        dense[alive] = values
        dense = dense.unflatten(-1, (kv, sizes.head_dim))
        mixed = values.new_empty(len(values), wide, dtype=torch.float64)
        for head in range(sizes.heads):
            there = p[head, at:, at:] @ dense[:, :, head // groups].double().flatten(1)
            mixed[:, head * sizes.head_dim : (head + 1) * sizes.head_dim] = there.view(*alive.shape, -1)[alive]
        return mixed

    ones = torch.ones(len(values), device=device)
    scales = attention.RowScales(ones, torch.ones_like(ones)) if dtype == torch.float16 else None
    p = probabilities.stored_probabilities(frozen, lse, packed, items, tile, len(packed), dtype) if is_long else None
    where = (piece.keys, piece.items, frozen, lse, tile, piece.longest)
    return Prepared(
        run=lambda out: attention.mix(values, *where, out, p, scales),
        start=lambda: poisoned(len(values), wide, dtype=dtype, device=device),
        oracle=oracle,
        moved=(values.numel() + len(values) * wide) * dtype.itemsize,
        flops=float((lengths * (lengths + 1)).sum()) * wide,
    )


def _completeness(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Prepared:
    layout = _chunk(sizes)
    x = _random(0, layout.n_rows, sizes.width, device=device)
    resid = (x.view(sizes.positions, -1, sizes.width).sum(1) * 2).to(dtype)  # far from complete: rounding drowns
    state = ComponentState(x, layout, 1)

    def oracle() -> Tensor:
        missed = x.view(sizes.positions, -1, sizes.width).sum(1, dtype=torch.float64) - resid.double()
        return (missed.norm(dim=1) / resid.double().norm(dim=1)).amax()[None]

    return Prepared(
        run=lambda _: torch.div(*state.missed(resid)).amax()[None],
        start=lambda: poisoned(1, dtype=torch.float32, device=device),
        oracle=oracle,
        moved=4.0 * x.numel(),
    )
