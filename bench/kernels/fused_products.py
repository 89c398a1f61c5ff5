"""The MLP's two products with the allocation inside: statistics in the epilogue of one, shares in the other's prologue.

`gate` writes g = x W_gateᵀ and, for every tile of rows, each neuron's largest g / T and the sum of the exponentials;
`log_partition` joins these to log Z; `down` makes exp(g/T - log Z) · a on the way in and adds to the state on the way
out. The gates are read once less, and never written back. That saves less than a GEMM of one's own loses
(``python -m bench.speed.tune``; the table is in depass_fast/kernels/README.md), so the library multiplies by torch's
GEMM and calls :mod:`depass_fast.kernels.allocation` in between.

A tile of rows never crosses a segment: ``tiles`` (t, 3) int32 holds first and last (excluded) row and the segment.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (as in depass_fast.kernels)

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from depass_fast.kernels import launch
from depass_fast.kernels.common import FLOATS, LOG2E, check, precision, product, widened


def product_config(dtype: torch.dtype, device: torch.device, which: str = "gate") -> dict:
    """The launch configuration of ``which``, gate or down; their tiles of rows, ``BM``, are the same."""
    if dtype == torch.float32:
        return {"BM": 64, "BN": 64, "BK": 32, "GROUP": 8, "num_warps": 4, "num_stages": 2}
    if launch.shared_memory(device) >= 160 << 10:
        wide = 256 if which == "gate" else 128  # `down` has exponentials in its registers, too
        return {"BM": 128, "BN": wide, "BK": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3}
    return {"BM": 128, "BN": 128, "BK": 32, "GROUP": 8, "num_warps": 8, "num_stages": 2}


def row_tiles(starts: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Tiles of at most ``size`` rows within a segment (t, 3), and the first tile of every segment (S + 1,)."""
    tiles, firsts = [], [0]
    for segment, (begin, end) in enumerate(pairwise(starts)):
        tiles += [(row, min(row + size, end), segment) for row in range(int(begin), int(end), size)]
        firsts.append(len(tiles))
    return np.array(tiles, np.int32).reshape(-1, 3), np.array(firsts, np.int32)


@triton.jit
def _place(n_tiles, n_columns, BN: tl.constexpr, GROUP: tl.constexpr):
    """The tile of rows and the block of columns of a program: GROUP row tiles share the columns' weights in L2."""
    columns = tl.cdiv(n_columns, BN)
    pid = tl.program_id(0)
    group = pid // (GROUP * columns)
    first = group * GROUP
    size = tl.minimum(n_tiles - first, GROUP)
    within = pid % (GROUP * columns)
    return first + within % size, within // size


@triton.jit(do_not_specialize=["away", "n_tiles", "bias"])
def _gate(
    x, w, g, constants, away, tops, sums, tiles, starts, n_tiles, n_columns, depth, per_t, bias,
    HAS_CONSTANT: tl.constexpr, HAS_AWAY: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    tile, block = _place(n_tiles, n_columns, BN, GROUP)
    first, last = tl.load(tiles + tile * 3).to(tl.int64), tl.load(tiles + tile * 3 + 1)
    row = first + tl.arange(0, BM)
    column = block * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    live, inside = row < last, column < n_columns
    x_at = x + row[:, None] * depth + k[None, :]
    w_at = w + column[None, :].to(tl.int64) * depth + k[:, None]
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, depth, BK):
        there = k < depth - start
        a = tl.load(x_at, mask=live[:, None] & there[None, :], other=0.0)
        b = tl.load(w_at, mask=there[:, None] & inside[None, :], other=0.0)
        acc = product(a, b, acc, PRECISION, WIDE)
        x_at += BK
        w_at += BK
    rounded = acc.to(g.dtype.element_ty)
    mask = live[:, None] & inside[None, :]
    tl.store(g + row[:, None] * n_columns + column[None, :], rounded, mask=mask)
    values = rounded.to(tl.float32)  # what `down` will read
    if HAS_CONSTANT:
        constant = tl.load(constants + column, mask=inside, other=0.0).to(tl.float32)
        home = tl.load(starts + tl.load(tiles + tile * 3 + 2)) + bias
        values += tl.where((row == home)[:, None], constant[None, :], 0.0)
    part = mask
    if HAS_AWAY:
        part = part & (tl.load(away + row, mask=live, other=1) == 0)[:, None]
    z = tl.where(part, values * per_t, float("-inf"))
    top = tl.max(z, 0)
    total = tl.sum(tl.exp2(z - tl.where(top == float("-inf"), 0.0, top)[None, :]), 0)
    kept = tile.to(tl.int64) * n_columns + column
    tl.store(tops + kept, top, mask=inside)
    tl.store(sums + kept, total, mask=inside)


@triton.jit
def _log_partition(tops, sums, log_z, tile_starts, n_columns, BN: tl.constexpr):
    blocks = tl.cdiv(n_columns, BN)
    segment = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    inside = column < n_columns
    top = tl.full((BN,), float("-inf"), tl.float32)
    total = tl.zeros((BN,), tl.float32)
    first = tl.load(tile_starts + segment)
    at = first.to(tl.int64) * n_columns + column
    for _ in range(first, tl.load(tile_starts + segment + 1)):
        here = tl.load(tops + at, mask=inside, other=float("-inf"))
        new = tl.maximum(top, here)
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(top - safe) + tl.load(sums + at, mask=inside, other=0.0) * tl.exp2(here - safe)
        top = new
        at += n_columns
    nobody = top == float("-inf")
    value = tl.where(nobody, top, top + tl.log2(tl.where(nobody, 1.0, total)))
    tl.store(log_z + segment.to(tl.int64) * n_columns + column, value, mask=inside)


@triton.jit(do_not_specialize=["away", "recorded", "n_tiles", "bias"])
def _down(
    x, g, w, act, log_z, constants, away, fallback, recorded, tiles, starts, n_tiles, n_columns, depth, w_stride,
    act_stride, per_t, bias,
    HAS_CONSTANT: tl.constexpr, HAS_AWAY: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    tile, block = _place(n_tiles, n_columns, BN, GROUP)
    first, last = tl.load(tiles + tile * 3).to(tl.int64), tl.load(tiles + tile * 3 + 1)
    segment = tl.load(tiles + tile * 3 + 2)
    row = first + tl.arange(0, BM)
    column = block * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    live, inside = row < last, column < n_columns
    here = live
    if HAS_AWAY:
        here = here & (tl.load(away + row, mask=live, other=1) == 0)
    lost = tl.load(fallback + row, mask=live, other=0.0)  # [BM]
    home = tl.load(starts + segment) + bias
    act_at = act + tl.load(recorded + segment) * act_stride
    z_at = log_z + segment.to(tl.int64) * depth
    g_at = g + row[:, None] * depth + k[None, :]
    w_at = w + column[None, :].to(tl.int64) * w_stride + k[:, None]
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, depth, BK):
        there = k < depth - start
        values = tl.load(g_at, mask=live[:, None] & there[None, :], other=0.0).to(tl.float32)
        if HAS_CONSTANT:
            constant = tl.load(constants + start + k, mask=there, other=0.0).to(tl.float32)
            values += tl.where((row == home)[:, None], constant[None, :], 0.0)
        z = tl.load(z_at + start + k, mask=there, other=0.0)
        a = tl.load(act_at + start + k, mask=there, other=0.0).to(tl.float32)
        nobody = z == float("-inf")
        share = tl.exp2(values * per_t - tl.where(nobody, 0.0, z)[None, :])
        share = tl.where(here[:, None], share, 0.0)
        share = tl.where(nobody[None, :], lost[:, None], share) * a[None, :]
        b = tl.load(w_at, mask=there[:, None] & inside[None, :], other=0.0)
        acc = product(share.to(w.dtype.element_ty), b, acc, PRECISION, WIDE)
        g_at += BK
        w_at += BK
    at = x + row[:, None] * n_columns + column[None, :]
    mask = live[:, None] & inside[None, :]
    tl.store(at, (tl.load(at, mask=mask, other=0.0).to(tl.float32) + acc).to(x.dtype.element_ty), mask=mask)


def _check(
    n_rows: int,
    n_neurons: int,
    tiles: Tensor,
    starts: Tensor,
    constant: Tensor | None,
    bias: int | None,
    away: Tensor | None,
) -> None:
    """Refuse arguments of both products that do not fit."""
    check("tiles", tiles, (None, 3), torch.int32)
    check("starts", starts, (None,), torch.int64)
    if constant is not None:
        check("constant", constant, (n_neurons,), *FLOATS)
        if bias is None:
            raise ValueError("constant: it is driven by `bias`, whose place in a segment is not given.")
    if away is not None:
        check("away", away, (n_rows,), torch.uint8)


def gate(
    x: Tensor,
    w_gate: Tensor,
    tiles: Tensor,
    tile_starts: Tensor,
    starts: Tensor,
    temperature: float,
    out: Tensor,
    constant: Tensor | None = None,
    bias: int | None = None,
    away: Tensor | None = None,
) -> Tensor:
    """g = x W_gateᵀ in ``out`` (r, I), and log Z in base 2, (S, I) float32, over every segment's rows.

    ``x`` (r, D), ``w_gate`` (I, D); ``tiles`` (t, 3) have at most ``BM`` rows; those of segment s begin at
    ``tile_starts`` (S + 1,), its rows at ``starts`` (S + 1,). The other arguments are those of
    :func:`depass_fast.kernels.allocation.allocate`; g itself lacks ``constant``. ``away`` (r,) uint8 marks all
    rows that take no part, dead ones too.

    Raises:
        ValueError: a tensor of another shape, dtype or memory layout.
    """
    check("w_gate", w_gate, (None, None), x.dtype)
    n_columns, depth = w_gate.shape
    check("x", x, (None, depth), *FLOATS)
    check("out", out, (len(x), n_columns), *FLOATS)
    check("tile_starts", tile_starts, (len(starts),), torch.int32)
    _check(len(x), n_columns, tiles, starts, constant, bias, away)
    tops = x.new_empty(2, len(tiles), n_columns, dtype=torch.float32)
    config = product_config(x.dtype, x.device, "gate")
    _gate[(len(tiles) * triton.cdiv(n_columns, config["BN"]),)](
        x,
        w_gate,
        out,
        x if constant is None else constant,
        tiles if away is None else away,
        tops[0],
        tops[1],
        tiles,
        starts,
        len(tiles),
        n_columns,
        depth,
        LOG2E / temperature,
        -1 if bias is None else bias,
        HAS_CONSTANT=constant is not None,
        HAS_AWAY=away is not None,
        PRECISION=precision(),
        WIDE=widened(x.dtype),
        **config,
    )
    log_z = tops.new_empty(len(starts) - 1, n_columns)
    grid = (len(log_z) * triton.cdiv(n_columns, 128),)
    _log_partition[grid](tops[0], tops[1], log_z, tile_starts, n_columns, BN=128, num_warps=4)
    return log_z


def down(
    x: Tensor,
    g: Tensor,
    w_down: Tensor,
    act: Tensor,
    recorded: Tensor,
    log_z: Tensor,
    tiles: Tensor,
    starts: Tensor,
    temperature: float,
    fallback: Tensor,
    constant: Tensor | None = None,
    bias: int | None = None,
    away: Tensor | None = None,
) -> None:
    """x (r, D) += (exp(g/T - log Z) · a) W_downᵀ, in place; ``w_down`` is (D, I).

    ``fallback`` (r,) float32 is a row's share where a neuron finds nobody eligible. The other arguments are those of
    :func:`gate`.

    Raises:
        ValueError: a tensor of another shape, dtype or memory layout. The rows of ``w_down`` and ``act`` may be parts
            of longer ones.
    """
    check("w_down", w_down, (None, None), g.dtype, spaced=True)
    n_columns, depth = w_down.shape
    check("g", g, (None, depth), *FLOATS)
    check("x", x, (len(g), n_columns), *FLOATS)
    check("act", act, (None, depth), *FLOATS, spaced=True)
    check("recorded", recorded, (len(starts) - 1,), torch.int64)
    check("log_z", log_z, (len(starts) - 1, depth), torch.float32)
    check("fallback", fallback, (len(g),), torch.float32)
    _check(len(g), depth, tiles, starts, constant, bias, away)
    config = product_config(g.dtype, g.device, "down")
    _down[(len(tiles) * triton.cdiv(n_columns, config["BN"]),)](
        x,
        g,
        w_down,
        act,
        log_z,
        act if constant is None else constant,
        tiles if away is None else away,
        fallback,
        recorded,
        tiles,
        starts,
        len(tiles),
        n_columns,
        depth,
        w_down.stride(0),
        act.stride(0),
        LOG2E / temperature,
        -1 if bias is None else bias,
        HAS_CONSTANT=constant is not None,
        HAS_AWAY=away is not None,
        PRECISION=precision(),
        WIDE=widened(g.dtype),
        **config,
    )
