"""Reading rows of the component state through a frozen norm, adding to them, and their dot products.

A *row* is one component at one position. Rows are grouped by position into segments. A kernel may see the state's rows
as they lie, or a *piece* of them: of every position the rows from ``source`` on, packed one position after the other
from ``base`` on (DESIGN.md section 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import row_config


@dataclass(frozen=True, eq=False)
class Rows:
    """Which rows of a state (R, D) a piece holds: ``segment`` (r,) int32, and for every segment where it begins.

    ``source`` (S,) int64 are first rows in the state, ``base`` (S + 1,) int64 first rows in the piece. ``source`` is
    None where the piece is neighbouring rows of the state, from ``first`` on.
    """

    segment: Tensor
    base: Tensor
    source: Tensor | None = None
    first: int = 0

    def __len__(self) -> int:
        return len(self.segment)


@triton.jit
def _source_row(row, segment, source, base, first, GATHER: tl.constexpr):
    if GATHER:
        at = tl.load(source + segment) + row - tl.load(base + segment)
    else:
        at = row + first
    return at


@triton.jit
def _read_rows(
    x,
    y,
    alive,
    segments,
    source,
    base,
    scale,
    weight,
    first,
    n_columns,
    GATHER: tl.constexpr,
    CENTRED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_ALIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    segment = tl.load(segments + row)
    d = tl.arange(0, BLOCK)
    inside = d < n_columns
    at = _source_row(row, segment, source, base, first, GATHER)
    values = tl.load(x + at * n_columns + d, mask=inside, other=0.0).to(tl.float32)  # [D]
    if HAS_ALIVE:
        tl.store(alive + row, tl.max((values != 0).to(tl.int32), 0))
    if CENTRED:
        values = tl.where(inside, values - tl.sum(values, 0) / n_columns, 0.0)
    values *= tl.load(scale + segment)
    if HAS_WEIGHT:
        values *= tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * n_columns + d, values.to(y.dtype.element_ty), mask=inside)


def read_rows(
    x: Tensor,
    rows: Rows,
    scale: Tensor,
    weight: Tensor | None,
    centred: bool,
    out: Tensor,
    alive: Tensor | None = None,
) -> Tensor:
    """γ ⊙ (x - mean x) · s of a piece's rows, in ``out``'s dtype: (R, D) -> ``out`` (r, D).

    ``scale`` (S,) float32 is s of every segment, ``weight`` γ (D,) or None; the mean stays where not ``centred``.
    ``alive`` (r,) uint8 receives whether a row holds anything but zeros.
    """
    n_columns = x.shape[1]
    block, warps = row_config(n_columns)
    _read_rows[(len(rows),)](
        x,
        out,
        out if alive is None else alive,
        rows.segment,
        rows.base if rows.source is None else rows.source,
        rows.base,
        scale,
        out if weight is None else weight,
        rows.first,
        n_columns,
        GATHER=rows.source is not None,
        CENTRED=centred,
        HAS_WEIGHT=weight is not None,
        HAS_ALIVE=alive is not None,
        BLOCK=block,
        num_warps=warps,
    )
    return out


@triton.jit
def _add_rows(x, y, segments, source, base, n_columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    segment = tl.load(segments + row)
    d = tl.arange(0, BLOCK)
    inside = d < n_columns
    at = x + _source_row(row, segment, source, base, 0, True) * n_columns + d
    gained = tl.load(y + row * n_columns + d, mask=inside).to(tl.float32)
    tl.store(at, (tl.load(at, mask=inside).to(tl.float32) + gained).to(x.dtype.element_ty), mask=inside)


def add_rows(x: Tensor, rows: Rows, gained: Tensor) -> None:
    """x[rows of the piece] += ``gained`` (r, D); in place. The piece must be a gathered one."""
    block, warps = row_config(x.shape[1])
    _add_rows[(len(rows),)](x, gained, rows.segment, rows.source, rows.base, x.shape[1], BLOCK=block, num_warps=warps)


@triton.jit
def _read_out(
    x, directions, out, segments, scale, n_rows, n_columns, n_directions, BR: tl.constexpr, BK: tl.constexpr,
    BD: tl.constexpr, HAS_SCALE: tl.constexpr
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    acc = tl.zeros((BR, BK), tl.float32)
    for start in range(0, n_columns, BD):
        d = start + tl.arange(0, BD)
        inside = d < n_columns
        a = tl.load(x + r[:, None] * n_columns + d[None, :], mask=(r < n_rows)[:, None] & inside[None, :], other=0.0)
        b = tl.load(
            directions + k[:, None].to(tl.int64) * n_columns + d[None, :],
            mask=(k < n_directions)[:, None] & inside[None, :],
            other=0.0,
        )
        acc = tl.dot(a.to(tl.float32), tl.trans(b.to(tl.float32)), acc, input_precision="ieee")
    if HAS_SCALE:
        acc *= tl.load(scale + tl.load(segments + r, mask=r < n_rows, other=0))[:, None]
    at = out + r[:, None] * n_directions + k[None, :]
    tl.store(at, acc, mask=(r < n_rows)[:, None] & (k < n_directions)[None, :])


def read_out(x: Tensor, directions: Tensor, segment: Tensor | None, scale: Tensor | None) -> Tensor:
    """x (R, D) · directions (K, D), times the scale (S,) of each row's segment (R,): (R, K) in float32."""
    out = x.new_empty(len(x), len(directions), dtype=torch.float32)
    if out.numel():
        grid = (triton.cdiv(len(x), 16), triton.cdiv(len(directions), 16))
        has_scale = scale is not None
        _read_out[grid](
            x,
            directions,
            out,
            segment if has_scale else out,
            scale if has_scale else out,
            len(x),
            x.shape[1],
            len(directions),
            BR=16,
            BK=16,
            BD=64,
            HAS_SCALE=has_scale,
        )
    return out
