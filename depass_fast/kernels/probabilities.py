"""Frozen attention probabilities: made again from Q, K and the log-sum-exp of their rows, tile by tile or all of them.

The G query heads of a KV head share its keys and values, so a tile's rows are pairs of query and head, (q, g) =
divmod(row, G).
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# (Triton declares a kernel's constants as `constexpr` and gets numbers; num_warps is no parameter of a kernel; to
# pyright a function of a kernel never returns)

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import FLOATS, check, power_of_two, precision, product, widened

ITEM = tl.constexpr(7)  # numbers of an item, see :func:`check_items`
SHRUNK = 15  # probabilities in float16 are multiplied by two to the power of this, and stay below its largest number


@dataclass(frozen=True)
class Frozen:
    """The recorded attention of a layer: q (T, H, d), k (T, Hkv, d), the scale of their products, and the mask's kind.

    ``key_bias`` (T, H) float32 is added to the logits of a key; ``out_scale`` (T,) multiplies what a query receives.
    """

    q: Tensor
    k: Tensor
    scale: float
    window: int | None = None
    softcap: float | None = None
    key_bias: Tensor | None = None
    out_scale: Tensor | None = None

    @property
    def groups(self) -> int:
        return self.q.shape[1] // self.k.shape[1]


@triton.jit
def _logits(
    q_tile, k, key_bias, key_packed, head, kv, qpos, kpos, n, scale, softcap, window,
    H: tl.constexpr, HKV: tl.constexpr, HD: tl.constexpr, BD: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Logits in base 2 of a tile of (query, head) rows against keys ``kpos``: [BR, BK], -inf where unseen."""
    d = tl.arange(0, BD)
    at = k + (key_packed.to(tl.int64) * HKV + kv)[None, :] * HD + d[:, None]
    k_tile = tl.load(at, mask=(kpos < n)[None, :] & (d < HD)[:, None], other=0.0)  # [BD, BK]
    acc = tl.zeros((q_tile.shape[0], k_tile.shape[1]), tl.float32)
    logits = product(q_tile, k_tile, acc, PRECISION, WIDE) * scale
    if HAS_CAP:  # tanh(x) = 1 - 2 / (exp(2 x) + 1), which is 1 long before that overflows
        double = tl.minimum(logits * (2.0 * 1.4426950408889634) / softcap, 64.0)
        logits = softcap * (1.0 - 2.0 / (tl.exp2(double) + 1.0))
    if HAS_BIAS:
        bias = key_bias + key_packed.to(tl.int64)[None, :] * H + head[:, None]
        logits += tl.load(bias, mask=(kpos < n)[None, :], other=0.0)
    seen = (kpos[None, :] <= qpos[:, None]) & (kpos < n)[None, :]
    if HAS_WINDOW:
        seen = seen & (kpos[None, :] > qpos[:, None] - window)
    return tl.where(seen, logits * 1.4426950408889634, float("-inf"))


@triton.jit
def _tile_of_queries(
    q, packed, items, window, H: tl.constexpr, HKV: tl.constexpr, HD: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    BD: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """A program's tile: its KV head and prompt, rows (query, head), their places and Q, and the first key it sees."""
    item = items + tl.program_id(0) * ITEM
    kv = tl.program_id(1)
    begin, end, first = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    G: tl.constexpr = H // HKV
    n = end - begin
    row = first + tl.arange(0, BR)
    qpos, head = row // G, kv * G + row % G
    live = qpos < n
    at = tl.load(packed + begin + qpos, mask=live, other=0).to(tl.int64) * H + head  # [BR]
    d = tl.arange(0, BD)
    q_tile = tl.load(q + at[:, None] * HD + d[None, :], mask=live[:, None] & (d < HD)[None, :], other=0.0)
    low = 0
    if HAS_WINDOW:
        low = tl.maximum(first // G - window + 1, 0) // BK * BK
    return kv, begin, n, first, qpos, head, live, at, q_tile, low


@triton.jit(do_not_specialize=["window"])
def _log_sum_exp(
    q, k, key_bias, lse, packed, items, scale, softcap, window,
    H: tl.constexpr, HKV: tl.constexpr, HD: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    kv, begin, n, first, qpos, head, live, at, q_tile, low = _tile_of_queries(
        q, packed, items, window, H, HKV, HD, BR, BK, BD, HAS_WINDOW
    )
    G: tl.constexpr = H // HKV
    top = tl.full((BR,), float("-inf"), tl.float32)
    total = tl.zeros((BR,), tl.float32)
    for start in range(low, tl.minimum((first + BR - 1) // G + 1, n), BK):
        kpos = start + tl.arange(0, BK)
        key = tl.load(packed + begin + kpos, mask=kpos < n, other=0)
        logits = _logits(
            q_tile, k, key_bias, key, head, kv, qpos, kpos, n, scale, softcap, window,
            H, HKV, HD, BD, HAS_WINDOW, HAS_CAP, HAS_BIAS, PRECISION, WIDE,
        )  # fmt: skip
        new = tl.maximum(top, tl.max(logits, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2(top - safe) + tl.sum(tl.exp2(logits - safe[:, None]), 1)
        top = new
    tl.store(lse + at, top + tl.log2(tl.where(live, total, 1.0)), mask=live)


@triton.jit(do_not_specialize=["window"])
def _probabilities(
    q, k, key_bias, lse, out, packed, items, scale, softcap, window, row, power,
    H: tl.constexpr, HKV: tl.constexpr, HD: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    kv, begin, n, first, qpos, head, live, at, q_tile, low = _tile_of_queries(
        q, packed, items, window, H, HKV, HD, BR, BK, BD, HAS_WINDOW
    )
    G: tl.constexpr = H // HKV
    norm = tl.load(lse + at, mask=live, other=float("inf")) - power  # P = 0 where there is no query
    for start in range(low, tl.minimum((first + BR - 1) // G + 1, n), BK):
        kpos = start + tl.arange(0, BK)
        key = tl.load(packed + begin + kpos, mask=kpos < n, other=0)
        logits = _logits(
            q_tile, k, key_bias, key, head, kv, qpos, kpos, n, scale, softcap, window,
            H, HKV, HD, BD, HAS_WINDOW, HAS_CAP, HAS_BIAS, PRECISION, WIDE,
        )  # fmt: skip
        p = tl.exp2(logits - norm[:, None]).to(out.dtype.element_ty)
        tl.store(out + at[:, None] * row + kpos[None, :], p, mask=live[:, None] & (kpos < n)[None, :])


def shared(frozen: Frozen) -> tuple[tuple, dict]:
    """Check the arguments that both kernels take; return scale, cap, window, and the compiled-in constants."""
    check("q", frozen.q, (None, None, None), *FLOATS)
    check("k", frozen.k, (len(frozen.q), None, frozen.q.shape[2]), frozen.q.dtype)
    if not frozen.k.shape[1] or frozen.q.shape[1] % frozen.k.shape[1]:
        raise ValueError(f"k: {frozen.k.shape[1]} heads do not divide the {frozen.q.shape[1]} heads of q.")
    if frozen.key_bias is not None:
        check("key_bias", frozen.key_bias, tuple(frozen.q.shape[:2]), torch.float32)
    if frozen.out_scale is not None:
        check("out_scale", frozen.out_scale, (len(frozen.q),), *FLOATS)
    numbers = (frozen.scale, frozen.softcap or 1.0, frozen.window or 0)
    h, hkv, hd = frozen.q.shape[1], frozen.k.shape[1], frozen.q.shape[2]
    constants = {
        "H": h,
        "HKV": hkv,
        "HD": hd,
        "BD": power_of_two(hd),
        "HAS_WINDOW": frozen.window is not None,
        "HAS_CAP": frozen.softcap is not None,
        "HAS_BIAS": frozen.key_bias is not None,
        "PRECISION": precision(),
        "WIDE": widened(frozen.q.dtype),
    }
    return numbers, constants


def log_sum_exp(frozen: Frozen, packed: Tensor, items: Tensor, tile: int) -> Tensor:
    """The log-sum-exp in base 2 of every query's logits: (T, H) float32, at the rows that ``items`` cover.

    ``items`` (n, 7) int32 hold the first and last (excluded) position of the prompt in ``packed`` and the first row of
    a tile of ``tile`` rows; the other columns are not read.

    Raises:
        ValueError: a tensor of another shape, dtype or memory layout.
    """
    numbers, constants = shared(frozen)
    check("packed", packed, (None,), torch.int32)
    check("items", items, (None, ITEM.value), torch.int32)
    out = frozen.q.new_empty(frozen.q.shape[:2], dtype=torch.float32)
    bias = out if frozen.key_bias is None else frozen.key_bias
    grid = (len(items), frozen.k.shape[1])
    _log_sum_exp[grid](
        frozen.q,
        frozen.k,
        bias,
        out,
        packed,
        items,
        *numbers,
        **constants,
        BR=tile,
        BK=32,
        num_warps=4,
    )
    return out


def stored_probabilities(
    frozen: Frozen, lse: Tensor, packed: Tensor, items: Tensor, tile: int, longest: int, dtype: torch.dtype
) -> Tensor:
    """P of every query and head, for prompts of up to ``longest`` positions: (T, H, K), keys counted in their prompt.

    It is zero for keys that a query does not see; K is a multiple of 16. In float16 it is P · 2^SHRUNK. ``items`` as of
    :func:`log_sum_exp`, whose result is ``lse``.

    Raises:
        ValueError: a tensor of another shape, dtype or memory layout.
    """
    numbers, constants = shared(frozen)
    check("lse", lse, tuple(frozen.q.shape[:2]), torch.float32)
    check("packed", packed, (None,), torch.int32)
    check("items", items, (None, ITEM.value), torch.int32)
    out = frozen.q.new_zeros(*frozen.q.shape[:2], -(-longest // 16) * 16, dtype=dtype)
    check("probabilities", out, (None, None, None), *FLOATS)
    _probabilities[(len(items), frozen.k.shape[1])](
        frozen.q,
        frozen.k,
        lse if frozen.key_bias is None else frozen.key_bias,
        lse,
        out,
        packed,
        items,
        *numbers,
        out.shape[2],
        float(SHRUNK) if dtype == torch.float16 else 0.0,
        **constants,
        BR=tile,
        BK=32,
        num_warps=4,
    )
    return out
