"""The distance of a state's sums from the hidden states, in one reading of the state: ‖Σ_m X[n, m] - x[n]‖.

A program has a segment and a block of columns. What it finds is the norm of that block, so that no program waits for
another; the norm of a row of these is that of the whole.
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
from .launch import sum_config


@dataclass(frozen=True, eq=False)
class Regular:
    """Segments of ``rows`` rows each, ``together`` of them at every position."""

    rows: int
    together: int = 1


@dataclass(frozen=True, eq=False)
class Jagged:
    """Segments from row ``starts`` (S + 1,) int64 on, each at position ``packed`` (S,) int64 of the trace."""

    starts: Tensor
    packed: Tensor


@triton.jit(do_not_specialize=["rows", "together"])
def _missed(
    state, x, missed, sizes, starts, packed, rows, together, n_columns, n_blocks,
    JAGGED: tl.constexpr, STAGES: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    segment = (tl.program_id(0) // n_blocks).to(tl.int64)
    block = tl.program_id(0) % n_blocks
    if JAGGED:
        first, at = tl.load(starts + segment), tl.load(packed + segment)
        count = (tl.load(starts + segment + 1) - first).to(tl.int32)
    else:
        first, at, count = segment * rows, segment // together, rows
    d = block * BD + tl.arange(0, BD)
    inside = d < n_columns
    m = tl.arange(0, BM)
    sums = tl.zeros((BM, BD), tl.float32)
    for t in tl.range(0, count, BM, num_stages=STAGES):
        row = first + t + m
        there = (t + m < count)[:, None] & inside[None, :]
        sums += tl.load(state + row[:, None] * n_columns + d[None, :], mask=there, other=0.0)
    here = tl.load(x + at * n_columns + d, mask=inside, other=0.0).to(tl.float32)
    lacking = tl.sum(sums, 0) - here
    tl.store(missed + segment * n_blocks + block, tl.sqrt(tl.sum(lacking * lacking, 0)))
    tl.store(sizes + at * n_blocks + block, tl.sqrt(tl.sum(here * here, 0)))


def missed_norms(state: Tensor, x: Tensor, segments: Regular | Jagged) -> tuple[Tensor, Tensor]:
    """‖Σ_m X[n, m] - x[n]‖ of every segment of a state (R, D) float32, and ‖x[n]‖ of every position of ``x`` (T, D).

    Both are norms of B blocks of columns: (S, B) and (T, B) float32. The second holds any numbers at positions of no
    segment.

    Raises:
        ValueError: a tensor of another shape, dtype or memory layout.
    """
    check("state", state, (None, None), torch.float32)
    n_columns, jagged = state.shape[1], isinstance(segments, Jagged)
    check("x", x, (None, n_columns), *FLOATS)
    if isinstance(segments, Jagged):
        check("packed", segments.packed, (None,), torch.int64)
        check("starts", segments.starts, (len(segments.packed) + 1,), torch.int64)
        count, tables, regular = len(segments.packed), (segments.starts, segments.packed), (0, 1)
    else:
        count, tables, regular = len(x) * segments.together, (state, state), (segments.rows, segments.together)
        check("state", state, (count * segments.rows, n_columns), torch.float32)
    config = sum_config(n_columns)
    blocks = triton.cdiv(n_columns, config["BD"])
    missed, sizes = (state.new_empty(n, blocks) for n in (count, len(x)))
    _missed[(count * blocks,)](state, x, missed, sizes, *tables, *regular, n_columns, blocks, JAGGED=jagged, **config)
    return missed, sizes
