"""OV aggregation: frozen attention probabilities applied to the values of every component.

mixed[(q, m), h] = Σ_k P[h, q, k] · values[(k, m), h / G]. P is made again tile by tile from Q, K and the log-sum-exp of
its rows, and used for all components that stream past; neither N² probabilities nor (M, N, H, D) exist anywhere.

The G query heads of a KV head share its values, so a tile's rows are pairs of query and head, (q, g) = divmod(row, G).
Component m has rows at the positions whose ``count`` is above m, which are those from its birth on. Keys before it are
skipped.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (Triton declares a kernel's constants as `constexpr` and gets numbers; num_warps is no parameter of a kernel)

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import FLOATS, check, power_of_two, precision, product, widened
from .launch import mix_config


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


@dataclass(frozen=True, eq=False)
class Keys:
    """The positions of a piece: ``packed`` (S,) int32 in the trace, ``base`` (S + 1,) int64 first rows, ``count`` (S,)
    int32 components alive there, and ``births`` (ΣM,) int32, per prompt and component, its first position.
    """

    packed: Tensor
    base: Tensor
    count: Tensor
    births: Tensor


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


@triton.jit(do_not_specialize=["window"])
def _log_sum_exp(
    q, k, key_bias, lse, packed, items, scale, softcap, window,
    H: tl.constexpr, HKV: tl.constexpr, HD: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_CAP: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    item = items + tl.program_id(0) * 6
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
def _mix(
    values, mixed, q, k, key_bias, lse, out_scale, packed, base, count, births, items, scale, softcap, window,
    H: tl.constexpr, HKV: tl.constexpr, HD: tl.constexpr, VD: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, ONE_TILE: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, PRECISION: tl.constexpr,
    WIDE: tl.constexpr, WIDE_VALUES: tl.constexpr,
):  # fmt: skip
    item = items + tl.program_id(0) * 6
    kv = tl.program_id(1)
    begin, end, first = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    m_first, m_last, component = tl.load(item + 3), tl.load(item + 4), tl.load(item + 5)
    G: tl.constexpr = H // HKV
    n = end - begin
    row = first + tl.arange(0, BR)
    qpos, g = row // G, row % G
    head = kv * G + g
    live = qpos < n
    query = tl.load(packed + begin + qpos, mask=live, other=0).to(tl.int64)
    d = tl.arange(0, BD)
    at = query * H + head
    q_tile = tl.load(q + at[:, None] * HD + d[None, :], mask=live[:, None] & (d < HD)[None, :], other=0.0)
    norm = tl.load(lse + at, mask=live, other=0.0)  # [BR]
    out_row = tl.load(base + begin + qpos, mask=live, other=0)  # int64 [BR]
    out_count = tl.load(count + begin + qpos, mask=live, other=0)
    if HAS_SCALE:
        factor = tl.load(out_scale + query, mask=live, other=0.0).to(tl.float32)
    stop = tl.minimum((first + BR - 1) // G + 1, n)  # keys that the tile's last query sees
    j = tl.arange(0, BM * BV)
    of, dd = j // BV, j % BV  # component and column of a block's columns
    if ONE_TILE:
        kpos = tl.arange(0, BK)
        key = tl.load(packed + begin + kpos, mask=kpos < n, other=0)
        logits = _logits(
            q_tile, k, key_bias, key, head, kv, qpos, kpos, n, scale, softcap, window,
            H, HKV, HD, BD, HAS_WINDOW, HAS_CAP, HAS_BIAS, PRECISION, WIDE,
        )  # fmt: skip
        p = tl.exp2(logits - norm[:, None]).to(values.dtype.element_ty)  # [BR, BK], for all components
        key_row = tl.load(base + begin + kpos, mask=kpos < n, other=0)
        key_count = tl.load(count + begin + kpos, mask=kpos < n, other=0)
    for m in range(m_first, m_last, BM):
        mm = m + of  # [BM · BV]
        acc = tl.zeros((BR, BM * BV), tl.float32)
        if ONE_TILE:
            where = (key_row[:, None] + mm[None, :]) * (HKV * VD) + kv * VD + dd[None, :]
            there = (mm[None, :] < tl.minimum(key_count, m_last)[:, None]) & (dd < VD)[None, :]
            v = tl.load(values + where, mask=there, other=0.0)  # [BK, BM · BV]
            acc = product(p, v, acc, PRECISION, WIDE_VALUES)
        else:
            low = tl.load(births + component + m)
            if HAS_WINDOW:
                low = tl.maximum(low, first // G - window + 1)
            for start in range(low // BK * BK, stop, BK):
                kpos = start + tl.arange(0, BK)
                key = tl.load(packed + begin + kpos, mask=kpos < n, other=0)
                logits = _logits(
                    q_tile, k, key_bias, key, head, kv, qpos, kpos, n, scale, softcap, window,
                    H, HKV, HD, BD, HAS_WINDOW, HAS_CAP, HAS_BIAS, PRECISION, WIDE,
                )  # fmt: skip
                p = tl.exp2(logits - norm[:, None]).to(values.dtype.element_ty)  # [BR, BK]
                key_row = tl.load(base + begin + kpos, mask=kpos < n, other=0)
                key_count = tl.load(count + begin + kpos, mask=kpos < n, other=0)
                where = (key_row[:, None] + mm[None, :]) * (HKV * VD) + kv * VD + dd[None, :]
                there = (mm[None, :] < tl.minimum(key_count, m_last)[:, None]) & (dd < VD)[None, :]
                v = tl.load(values + where, mask=there, other=0.0)
                acc = product(p, v, acc, PRECISION, WIDE_VALUES)
        if HAS_SCALE:
            acc *= factor[:, None]
        where = (out_row[:, None] + mm[None, :]) * (H * VD) + (head * VD)[:, None] + dd[None, :]
        there = (mm[None, :] < tl.minimum(out_count, m_last)[:, None]) & (dd < VD)[None, :]
        tl.store(mixed + where, acc.to(mixed.dtype.element_ty), mask=there)


def _shared(frozen: Frozen) -> tuple[tuple, dict]:
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

    ``items`` (n, 6) int32 hold the first and last (excluded) position of the prompt in ``packed`` and the first row of
    a tile of ``tile`` rows; the other columns are not read.

    Raises:
        ValueError: a tensor of another shape, dtype or memory layout.
    """
    numbers, constants = _shared(frozen)
    check("packed", packed, (None,), torch.int32)
    check("items", items, (None, 6), torch.int32)
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


def mix(
    values: Tensor,
    keys: Keys,
    items: Tensor,
    frozen: Frozen,
    lse: Tensor,
    tile: int,
    longest: int,
    out: Tensor,
) -> Tensor:
    """P applied to the values (r, Hkv·v) of a piece's rows -> ``out`` (r, H·v), at the same rows.

    A head's values may be wider or narrower than its queries and keys: v need not be d.

    ``items`` (n, 6) int32 hold the first and last position of a prompt, the first row of a tile of ``tile`` (query,
    head) rows, the first and last component, and the first index of the prompt's births. Together they must cover all
    rows. ``longest`` is the number of positions of the longest prompt.

    Raises:
        ValueError: a tensor of another shape, dtype or memory layout.
    """
    numbers, constants = _shared(frozen)
    heads, kv, head_dim = *frozen.q.shape[1:2], *frozen.k.shape[1:]
    check("values", values, (None, None), *FLOATS)
    value_dim = values.shape[1] // kv
    check("values", values, (None, kv * value_dim), *FLOATS)
    check("out", out, (len(values), heads * value_dim), *FLOATS)
    check("lse", lse, tuple(frozen.q.shape[:2]), torch.float32)
    check("packed", keys.packed, (None,), torch.int32)
    check("base", keys.base, (len(keys.packed) + 1,), torch.int64)
    check("count", keys.count, (len(keys.packed),), torch.int32)
    check("births", keys.births, (None,), torch.int32)
    check("items", items, (None, 6), torch.int32)
    dtype = torch.promote_types(values.dtype, frozen.q.dtype)
    config = mix_config(longest, max(head_dim, value_dim), frozen.groups, tile, dtype, values.device)
    grid = (len(items), kv)
    _mix[grid](
        values,
        out,
        frozen.q,
        frozen.k,
        lse if frozen.key_bias is None else frozen.key_bias,
        lse,
        lse if frozen.out_scale is None else frozen.out_scale,
        keys.packed,
        keys.base,
        keys.count,
        keys.births,
        items,
        *numbers,
        **constants,
        VD=value_dim,
        BV=power_of_two(value_dim),
        HAS_SCALE=frozen.out_scale is not None,
        WIDE_VALUES=widened(values.dtype),
        BR=tile,
        **config,
    )
    return out
