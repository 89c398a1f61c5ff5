"""Reading rows of the component state through a frozen norm, its scales, adding to rows, and their dot products.

A *row* is one component at one position. Rows are grouped by position into segments. A kernel may see neighbouring rows
of the state, or a *piece* gathered from it: the rows of every position from ``source`` on, packed one position after
the other from ``base`` on (DESIGN.md section 3).
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (Triton declares a kernel's constants as `constexpr` and gets numbers; num_warps is no parameter of a kernel)

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import FLOATS, check
from .launch import row_config

ROW_TOP = 2  # exponent of the largest element of a row with a scale of its own


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a state (R, D) that a piece holds: ``segment`` (r,) int32, and the first row of every segment.

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
def _source_row(row, live, segment, source, base, first, GATHER: tl.constexpr):
    """The places in the state of rows of the piece: int64 [BR]."""
    if GATHER:
        row += tl.load(source + segment, mask=live, other=0) - tl.load(base + segment, mask=live, other=0)
    else:
        row += first
    return row


@triton.jit(do_not_specialize=["scale", "first", "n_rows"])
def _read_rows(
    x,
    y,
    alive,
    row_scale,
    segments,
    source,
    base,
    scale,
    weight,
    first,
    n_rows,
    n_columns,
    GATHER: tl.constexpr,
    CENTRED: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_ALIVE: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    TOP: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    live = row < n_rows
    segment = tl.load(segments + row, mask=live, other=0)
    d = tl.arange(0, BD)
    inside = d < n_columns
    there = live[:, None] & inside[None, :]
    at = _source_row(row, live, segment, source, base, first, GATHER)
    values = tl.load(x + at[:, None] * n_columns + d[None, :], mask=there, other=0.0).to(tl.float32)  # [BR, BD]
    if HAS_ALIVE:
        tl.store(alive + row, tl.max((values != 0).to(tl.int32), 1), mask=live)
    if CENTRED:
        values = tl.where(there, values - (tl.sum(values, 1) / n_columns)[:, None], 0.0)
    values *= tl.load(scale + segment, mask=live, other=0.0)[:, None]
    if HAS_WEIGHT:
        values *= tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)[None, :]
    if HAS_ROW_SCALE:  # by the exponent's bits: every step is exact
        exponent = (tl.max(tl.abs(values), 1).to(tl.int32, bitcast=True) >> 23) - 127
        shift = tl.minimum(tl.maximum(TOP - exponent, -126), 126)
        values *= ((shift + 127) << 23).to(tl.float32, bitcast=True)[:, None]
        tl.store(row_scale + row, ((127 - shift) << 23).to(tl.float32, bitcast=True), mask=live)
    tl.store(y + row[:, None] * n_columns + d[None, :], values.to(y.dtype.element_ty), mask=there)


def read_rows(
    x: Tensor,
    rows: Rows,
    scale: Tensor,
    weight: Tensor | None,
    centred: bool,
    out: Tensor,
    alive: Tensor | None = None,
    row_scale: Tensor | None = None,
) -> Tensor:
    """γ ⊙ (x - mean x) · s of a piece's rows, in ``out``'s dtype: (R, D) -> ``out`` (r, D).

    ``scale`` (S,) float32 is s of every segment, ``weight`` γ (D,) or None; the mean stays where not ``centred``.
    ``alive`` (r,) uint8 receives 1 for rows that hold anything but zeros, else 0.

    With ``row_scale`` (r,) float32 every row is multiplied by the power of two that brings its largest element to
    between 2^ROW_TOP and twice that, and ``row_scale`` receives its inverse: a row is ``out`` · ``row_scale``.

    Raises:
        ValueError: a tensor of another shape, dtype or memory layout.
    """
    n_columns = x.shape[-1]
    _check(x, rows)
    check("scale", scale, (len(rows.base) - 1,), torch.float32)
    check("out", out, (len(rows), n_columns), *FLOATS)
    if weight is not None:
        check("weight", weight, (n_columns,), *FLOATS)
    if alive is not None:
        check("alive", alive, (len(rows),), torch.uint8)
    if row_scale is not None:
        check("row_scale", row_scale, (len(rows),), torch.float32)
    config = row_config(n_columns)
    _read_rows[(triton.cdiv(len(rows), config["BR"]),)](
        x,
        out,
        out if alive is None else alive,
        scale if row_scale is None else row_scale,
        rows.segment,
        rows.base if rows.source is None else rows.source,
        rows.base,
        scale,
        out if weight is None else weight,
        rows.first,
        len(rows),
        n_columns,
        GATHER=rows.source is not None,
        CENTRED=centred,
        HAS_WEIGHT=weight is not None,
        HAS_ALIVE=alive is not None,
        HAS_ROW_SCALE=row_scale is not None,
        TOP=ROW_TOP,
        **config,
    )
    return out


def _check(x: Tensor, rows: Rows) -> None:
    check("x", x, (None, None), *FLOATS)
    check("segment", rows.segment, (None,), torch.int32)
    check("base", rows.base, (None,), torch.int64)
    if rows.source is not None:
        check("source", rows.source, (len(rows.base) - 1,), torch.int64)


@triton.jit(do_not_specialize=["n_rows"])
def _row_scales(
    x, at, out, eps, n_rows, n_columns, PICKED: tl.constexpr, CENTRED: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    live = row < n_rows
    place = tl.load(at + row, mask=live, other=0) if PICKED else row
    d = tl.arange(0, BD)
    there = live[:, None] & (d < n_columns)[None, :]
    values = tl.load(x + place[:, None] * n_columns + d[None, :], mask=there, other=0.0).to(tl.float32)  # [BR, BD]
    if CENTRED:
        values = tl.where(there, values - (tl.sum(values, 1) / n_columns)[:, None], 0.0)
    tl.store(out + row, tl.rsqrt(tl.sum(values * values, 1) / n_columns + eps), mask=live)


def row_scales(x: Tensor, at: Tensor | None, eps: float, centred: bool) -> Tensor:
    """s = 1 / sqrt(mean (x - mean x)² + eps) of hidden states x (T, D), or of those ``at`` (S,) int64: float32.

    The mean stays where not ``centred``.

    Raises:
        ValueError: a tensor of another shape, dtype or memory layout.
    """
    check("x", x, (None, None), *FLOATS)
    if at is not None:
        check("at", at, (None,), torch.int64)
    n_rows, config = len(x if at is None else at), row_config(x.shape[1])
    out = x.new_empty(n_rows, dtype=torch.float32)
    _row_scales[(triton.cdiv(n_rows, config["BR"]),)](
        x, out if at is None else at, out, eps, n_rows, x.shape[1], PICKED=at is not None, CENTRED=centred, **config
    )
    return out


@triton.jit(do_not_specialize=["first", "n_rows"])
def _add_rows(
    x, y, row_scale, segments, source, base, first, n_rows, n_columns, GATHER: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    live = row < n_rows
    segment = tl.load(segments + row, mask=live, other=0)
    d = tl.arange(0, BD)
    there = live[:, None] & (d < n_columns)[None, :]
    gained = tl.load(y + row[:, None] * n_columns + d[None, :], mask=there).to(tl.float32)  # [BR, BD]
    if HAS_ROW_SCALE:
        gained *= tl.load(row_scale + row, mask=live, other=0.0)[:, None]
    at = x + _source_row(row, live, segment, source, base, first, GATHER)[:, None] * n_columns + d[None, :]
    tl.store(at, (tl.load(at, mask=there).to(tl.float32) + gained).to(x.dtype.element_ty), mask=there)


def add_rows(x: Tensor, rows: Rows, gained: Tensor, row_scale: Tensor | None = None) -> None:
    """x[rows of the piece] += ``gained`` (r, D), times ``row_scale`` (r,) float32 if given; in place.

    Raises:
        ValueError: a tensor is of another shape, dtype or memory layout.
    """
    _check(x, rows)
    check("gained", gained, (len(rows), x.shape[1]), *FLOATS)
    if row_scale is not None:
        check("row_scale", row_scale, (len(rows),), torch.float32)
    config = row_config(x.shape[1])
    _add_rows[(triton.cdiv(len(rows), config["BR"]),)](
        x,
        gained,
        gained if row_scale is None else row_scale,
        rows.segment,
        rows.base if rows.source is None else rows.source,
        rows.base,
        rows.first,
        len(rows),
        x.shape[1],
        GATHER=rows.source is not None,
        HAS_ROW_SCALE=row_scale is not None,
        **config,
    )


@triton.jit(do_not_specialize=["n_rows", "n_positions"])
def _add_norm_back(
    x, y, narrow, scale, weight, n_rows, n_columns, n_positions, CENTRED: tl.constexpr, HAS_SCALE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_NARROW: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    live = row < n_rows
    d = tl.arange(0, BD)
    inside = d < n_columns
    there = live[:, None] & inside[None, :]
    at = row[:, None] * n_columns + d[None, :]
    gained = tl.load(y + at, mask=there, other=0.0).to(tl.float32)  # [BR, BD]
    if HAS_WEIGHT:
        gained *= tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)[None, :]
    if HAS_SCALE:
        gained *= tl.load(scale + row % n_positions, mask=live, other=0.0)[:, None]
    if CENTRED:
        gained -= (tl.sum(gained, 1) / n_columns)[:, None]
    total = tl.load(x + at, mask=there, other=0.0) + gained
    tl.store(x + at, total, mask=there)
    if HAS_NARROW:
        tl.store(narrow + at, total.to(narrow.dtype.element_ty), mask=there)


def add_norm_back(
    x: Tensor, y: Tensor, scale: Tensor | None, weight: Tensor | None, centred: bool, narrow: Tensor | None = None
) -> None:
    """Take gradients behind a frozen norm through it and add them to those before it, in place.

    That is x += z - mean(z), with z = γ ⊙ y · s. ``x`` (R, D) is float32, ``y`` (R, D) too or in half. Row r is at
    position r % S: ``scale`` (S,) float32 holds s of every position, None stands for ones; ``weight`` is γ (D,) or
    None; the mean is subtracted where ``centred``.
    ``narrow`` (R, D) receives x in its own dtype, for the next product.

    Raises:
        ValueError: a tensor of another shape, dtype or memory layout.
    """
    check("x", x, (None, None), torch.float32)
    n_rows, n_columns = x.shape
    check("y", y, (n_rows, n_columns), *FLOATS)
    if scale is not None:
        check("scale", scale, (None,), torch.float32)
    if weight is not None:
        check("weight", weight, (n_columns,), *FLOATS)
    if narrow is not None:
        check("narrow", narrow, (n_rows, n_columns), *FLOATS)
    config = row_config(n_columns)
    _add_norm_back[(triton.cdiv(n_rows, config["BR"]),)](
        x,
        y,
        x if narrow is None else narrow,
        x if scale is None else scale,
        x if weight is None else weight,
        n_rows,
        n_columns,
        1 if scale is None else len(scale),
        CENTRED=centred,
        HAS_SCALE=scale is not None,
        HAS_WEIGHT=weight is not None,
        HAS_NARROW=narrow is not None,
        **config,
    )


@triton.jit(do_not_specialize=["n_rows", "n_directions"])
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
    """x (R, D) · directions (K, D), times the scale (S,) of each row's segment (R,): (R, K) in float32.

    Raises:
        ValueError: a tensor of another shape, dtype or memory layout, or only one of ``segment`` and ``scale``.
    """
    check("x", x, (None, None), *FLOATS)
    check("directions", directions, (None, x.shape[1]), *FLOATS)
    if (segment is None) != (scale is None):
        raise ValueError("segment, scale: a scale is one of each row's segment; give both or none.")
    if segment is not None and scale is not None:
        check("segment", segment, (len(x),), torch.int32)
        check("scale", scale, (None,), torch.float32)
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
