"""P of few positions applied to rows, and its transpose, in one launch: what a batched product needs two copies for.

P of a prompt is stored, (Hkv, G, Q, N): the G query heads of a KV head share its values.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (Triton declares a kernel's constants as `constexpr` and gets numbers; num_warps is no parameter of a kernel)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import FLOATS, check, precision, product, widened
from .launch import few_config

MOST = 64  # positions; a head's columns may be four times as many


@triton.jit(do_not_specialize=["n_rows", "n_out", "n_in", "p_head", "p_out", "p_in"])
def _apply_few(
    p, x, y, n_rows, n_out, n_in, p_head, p_out, p_in, HEADS: tl.constexpr, GROUPS: tl.constexpr, SHARE: tl.constexpr,
    HD: tl.constexpr, BR: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """A head of y at all positions, of BR rows: the sum over GROUPS heads of x, each shared by SHARE heads of y."""
    head = tl.program_id(0) % HEADS
    o, i = tl.arange(0, BO), tl.arange(0, BI)
    column = tl.arange(0, BR * BD)
    row = (tl.program_id(0) // HEADS).to(tl.int64) * BR + column // BD  # [BR · BD]
    d = column % BD
    live = (row < n_rows) & (d < HD)
    acc = tl.zeros((BO, BR * BD), tl.float32)
    for g in range(GROUPS):
        at = (head * GROUPS + g) * p_head + o[:, None] * p_out + i[None, :] * p_in
        tile = tl.load(p + at, mask=(o < n_out)[:, None] & (i < n_in)[None, :], other=0.0)
        at = (row[None, :] * n_in + i[:, None]) * (HEADS // SHARE * GROUPS * HD) + (head // SHARE * GROUPS + g) * HD
        values = tl.load(x + at + d[None, :], mask=live[None, :] & (i < n_in)[:, None], other=0.0)
        acc = product(tile, values, acc, PRECISION, WIDE)
    at = (row[None, :] * n_out + o[:, None]) * (HEADS * HD) + head * HD + d[None, :]
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=live[None, :] & (o < n_out)[:, None])


def fits(queries: int, keys: int, head_dim: int) -> bool:
    """True if :func:`apply_few` takes P of so many queries and keys, and heads of so many columns."""
    return max(queries, keys) <= MOST and head_dim <= 4 * MOST


def apply_few(p: Tensor, x: Tensor, transposed: bool = False) -> Tensor:
    """P (Hkv, G, Q, N) applied to values (R, N, Hkv·d): what the heads mix, (R, Q, Hkv·G·d), in P's dtype.

    ``transposed``: from gradients of what they mix to those of the values. P's heads are at equal distances.

    Raises:
        ValueError: a tensor of another shape, dtype or memory layout, or one that does not fit.
    """
    kv, groups, queries, keys = p.shape
    if p.dtype not in FLOATS:
        raise ValueError(f"p: expected float32, float16 or bfloat16; got {str(p.dtype).removeprefix('torch.')}.")
    step = p.stride(1) if groups > 1 else p.stride(0)
    if kv > 1 and groups > 1 and p.stride(0) != groups * step:
        raise ValueError(f"p: expected heads at equal distances; got strides {p.stride()}.")
    n_in, n_out, heads = (queries, keys, kv) if transposed else (keys, queries, kv * groups)
    wide = kv * groups if transposed else kv
    check("x", x, (None, n_in, None), p.dtype)
    head_dim = x.shape[2] // wide
    check("x", x, (None, n_in, wide * head_dim), p.dtype)
    if not fits(queries, keys, head_dim):
        raise ValueError(f"p: {queries} queries, {keys} keys and {head_dim} columns; see `fits`.")
    y = x.new_empty(len(x), n_out, heads * head_dim)
    config = few_config(n_out, n_in, head_dim, p.dtype)
    _apply_few[(triton.cdiv(len(x), config["BR"]) * heads,)](
        p,
        x,
        y,
        len(x),
        n_out,
        n_in,
        step,
        p.stride(3) if transposed else p.stride(2),
        p.stride(2) if transposed else p.stride(3),
        HEADS=heads,
        GROUPS=groups if transposed else 1,
        SHARE=1 if transposed else groups,
        HD=head_dim,
        PRECISION=precision(),
        WIDE=widened(p.dtype),
        **config,
    )
    return y
