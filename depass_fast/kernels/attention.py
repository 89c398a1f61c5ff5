"""OV aggregation: frozen attention probabilities applied to the values of every component.

mixed[(q, m), h] = Σ_k P[h, q, k] · values[(k, m), h / G]. P is made again tile by tile, or read where it was stored,
and used for all components that stream past; (M, N, H, D) exists nowhere.

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

from .common import FLOATS, check, power_of_two, product, widened, wider
from .launch import mix_config, takes_scales
from .probabilities import ITEM, SHRUNK, Frozen, _logits, shared


@dataclass(frozen=True, eq=False)
class Keys:
    """The positions of a piece: ``packed`` (S,) int32 in the trace, ``base`` (S + 1,) int64 first rows, ``count`` (S,)
    int32 components alive there, and ``births`` (ΣM,) int32, per prompt and component, its first position.
    """

    packed: Tensor
    base: Tensor
    count: Tensor
    births: Tensor


@dataclass(frozen=True, eq=False)
class RowScales:
    """Scales (r,) float32 of a piece's rows: those of the ``values``, and where those of the ``mixed`` rows are put.

    A row is what is stored times its scale. Mixed rows are stored ``shift`` powers of two smaller than their values.
    """

    values: Tensor
    mixed: Tensor
    shift: int = 0


@triton.jit
def _tile_of_p(
    q_tile, k, key_bias, probabilities, norm, at, key, head, kv, qpos, kpos, n, start, scale, softcap, window, row,
    live, H: tl.constexpr, HKV: tl.constexpr, HD: tl.constexpr, BD: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_BIAS: tl.constexpr, STORED: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """P of a tile of (query, head) rows and keys, in float32 or as it is stored: [BR, BK]."""
    if STORED:  # a mask that is the same for neighbours, and so wide loads; zero where a key is not seen
        column = start + tl.arange(0, kpos.shape[0])
        inside = live[:, None] & (column < row)[None, :]
        p = tl.load(probabilities + at[:, None] * row + column[None, :], mask=inside, other=0.0)
    else:
        logits = _logits(
            q_tile, k, key_bias, key, head, kv, qpos, kpos, n, scale, softcap, window,
            H, HKV, HD, BD, HAS_WINDOW, HAS_CAP, HAS_BIAS, PRECISION, WIDE,
        )  # fmt: skip
        p = tl.exp2(logits - norm[:, None])
    return p


@triton.jit(do_not_specialize=["window"])
def _mix(
    values, mixed, q, k, key_bias, lse, probabilities, out_scale, value_scale, mixed_scale,
    packed, base, count, births, items, scale, softcap, window, row, power, shrink,
    H: tl.constexpr, HKV: tl.constexpr, HD: tl.constexpr, VD: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, ONE_TILE: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, STORED: tl.constexpr,
    SCALED: tl.constexpr, SHRINKS: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, WIDE_VALUES: tl.constexpr,
):  # fmt: skip
    item = items + tl.program_id(0) * ITEM
    kv = tl.program_id(1)
    begin, end, first = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    m_first, m_last, component, before = tl.load(item + 3), tl.load(item + 4), tl.load(item + 5), tl.load(item + 6)
    G: tl.constexpr = H // HKV
    n = end - begin
    r = first + tl.arange(0, BR)
    qpos, g = r // G, r % G
    head = kv * G + g
    live = qpos < n
    query = tl.load(packed + begin + qpos, mask=live, other=0).to(tl.int64)
    at = query * H + head
    q_tile = at
    norm = at
    if not STORED:
        d = tl.arange(0, BD)
        q_tile = tl.load(q + at[:, None] * HD + d[None, :], mask=live[:, None] & (d < HD)[None, :], other=0.0)
        norm = tl.load(lse + at, mask=live, other=float("inf")) - power  # [BR]; P = 0 where there is no query
    out_row = tl.load(base + begin + qpos, mask=live, other=0)  # int64 [BR]
    out_count = tl.load(count + begin + qpos, mask=live, other=0)
    if HAS_SCALE:
        factor = tl.load(out_scale + query, mask=live, other=0.0).to(tl.float32)
    stop = tl.minimum((first + BR - 1) // G + 1, n)  # keys that the tile's last query sees
    shift = before if STORED else 0  # stored probabilities are read from columns that are multiples of BK
    j = tl.arange(0, BM * BV)
    of, dd = j // BV, j % BV  # component and column of a block's columns
    if ONE_TILE:
        kpos = tl.arange(0, BK)
        key = tl.load(packed + begin + kpos, mask=kpos < n, other=0)
        p_all = _tile_of_p(
            q_tile, k, key_bias, probabilities, norm, at, key, head, kv, qpos, kpos, n, before, scale, softcap, window,
            row, live, H, HKV, HD, BD, HAS_WINDOW, HAS_CAP, HAS_BIAS, STORED, PRECISION, WIDE,
        )  # fmt: skip
        key_row = tl.load(base + begin + kpos, mask=kpos < n, other=0)
        key_count = tl.load(count + begin + kpos, mask=kpos < n, other=0)
        if not SCALED:
            p_all = p_all.to(values.dtype.element_ty)  # [BR, BK], for all components
    for m in range(m_first, m_last, BM):
        mm = m + of  # [BM · BV]
        acc = tl.zeros((BR, BM * BV), tl.float32)
        if ONE_TILE:
            p = p_all
            if SCALED:  # one component at a time: its rows' scales in units of the largest
                own = tl.load(value_scale + key_row + m, mask=m < key_count, other=0.0)  # [BK]
                top = tl.max(own, 0)
                own = own / tl.maximum(top, 1.1754944e-38)
                p = (p_all.to(tl.float32) * own[None, :]).to(values.dtype.element_ty)
            where = (key_row[:, None] + mm[None, :]) * (HKV * VD) + kv * VD + dd[None, :]
            there = (mm[None, :] < tl.minimum(key_count, m_last)[:, None]) & (dd < VD)[None, :]
            v = tl.load(values + where, mask=there, other=0.0)  # [BK, BM · BV]
            acc = product(p, v, acc, PRECISION, WIDE_VALUES)
        else:
            low = tl.load(births + component + m)
            if HAS_WINDOW:
                low = tl.maximum(low, first // G - window + 1)
            if SCALED:
                largest = tl.zeros((BK,), tl.float32)
                for start in range((shift + low) // BK * BK, shift + stop, BK):
                    kpos = start - shift + tl.arange(0, BK)
                    here = (kpos >= 0) & (kpos < stop)
                    key_row = tl.load(base + begin + kpos, mask=here, other=0)
                    key_count = tl.load(count + begin + kpos, mask=here, other=0)
                    own = tl.load(value_scale + key_row + m, mask=m < key_count, other=0.0)
                    largest = tl.maximum(largest, own)
                top = tl.max(largest, 0)
                unit = 1.0 / tl.maximum(top, 1.1754944e-38)
            for start in range((shift + low) // BK * BK, shift + stop, BK):
                kpos = start - shift + tl.arange(0, BK)
                here = (kpos >= 0) & (kpos < stop)
                key = 0
                if not STORED:
                    key = tl.load(packed + begin + kpos, mask=here, other=0)
                p = _tile_of_p(
                    q_tile, k, key_bias, probabilities, norm, at, key, head, kv, qpos, kpos, n, start, scale, softcap,
                    window, row, live, H, HKV, HD, BD, HAS_WINDOW, HAS_CAP, HAS_BIAS, STORED, PRECISION, WIDE,
                )  # fmt: skip
                key_row = tl.load(base + begin + kpos, mask=here, other=0)
                key_count = tl.load(count + begin + kpos, mask=here, other=0)
                if SCALED:
                    own = tl.load(value_scale + key_row + m, mask=m < key_count, other=0.0)
                    p = p.to(tl.float32) * (own * unit)[None, :]
                where = (key_row[:, None] + mm[None, :]) * (HKV * VD) + kv * VD + dd[None, :]
                there = (mm[None, :] < tl.minimum(key_count, m_last)[:, None]) & (dd < VD)[None, :]
                v = tl.load(values + where, mask=there, other=0.0)
                acc = product(p.to(values.dtype.element_ty), v, acc, PRECISION, WIDE_VALUES)
        if SHRINKS:
            acc *= shrink
        if SCALED:
            unscaled = top / shrink * tl.exp2(-power)
            if HAS_SCALE:
                unscaled = unscaled * factor
            tl.store(
                mixed_scale + out_row + m,
                tl.zeros((BR,), tl.float32) + unscaled,
                mask=live & (g == 0) & (m < out_count) & (kv == 0),
            )
        elif HAS_SCALE:
            acc *= factor[:, None]
        where = (out_row[:, None] + mm[None, :]) * (H * VD) + (head * VD)[:, None] + dd[None, :]
        there = (mm[None, :] < tl.minimum(out_count, m_last)[:, None]) & (dd < VD)[None, :]
        tl.store(mixed + where, acc.to(mixed.dtype.element_ty), mask=there)


def mix(
    values: Tensor,
    keys: Keys,
    items: Tensor,
    frozen: Frozen,
    lse: Tensor,
    tile: int,
    longest: int,
    out: Tensor,
    probabilities: Tensor | None = None,
    scales: RowScales | None = None,
) -> Tensor:
    """P applied to the values (r, Hkv·v) of a piece's rows -> ``out`` (r, H·v), at the same rows.

    A head's values may be wider or narrower than its queries and keys: v need not be d.

    ``items`` (n, 7) int32 hold the first and last (excluded) position of a prompt, the first row of a tile of ``tile``
    (query, head) rows, the first and last component, the first index of the prompt's births, and the number of the
    prompt's positions before the piece's. Together they must cover all rows. ``longest`` is the number of positions of
    the longest prompt.

    ``probabilities`` are those of :func:`.probabilities.stored_probabilities`; without them they are made again.
    ``scales`` belong to values in float16, and then to ``out``.

    Raises:
        ValueError: a tensor of another shape, dtype or memory layout.
    """
    numbers, constants = shared(frozen)
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
    check("items", items, (None, ITEM.value), torch.int32)
    if probabilities is not None:
        check("probabilities", probabilities, (*frozen.q.shape[:2], None), values.dtype)
    if scales is not None:
        check("scales.values", scales.values, (len(values),), torch.float32)
        check("scales.mixed", scales.mixed, (len(values),), torch.float32)
    power = SHRUNK if values.dtype == torch.float16 and (scales is not None or probabilities is not None) else 0
    shift = power + (0 if scales is None else scales.shift)
    dtype = wider(values.dtype, frozen.q.dtype) if probabilities is None else values.dtype
    if scales is not None and not takes_scales(longest, max(head_dim, value_dim), frozen.groups, dtype, values.device):
        raise ValueError(
            f"scales: {frozen.groups} heads of a group lie in several tiles, which have units of their own."
        )
    has = {"stored": probabilities is not None, "scaled": scales is not None}
    config = mix_config(longest, max(head_dim, value_dim), frozen.groups, tile, dtype, values.device, **has)
    _mix[(len(items), kv)](
        values,
        out,
        frozen.q,
        frozen.k,
        lse if frozen.key_bias is None else frozen.key_bias,
        lse,
        lse if probabilities is None else probabilities,
        lse if frozen.out_scale is None else frozen.out_scale,
        lse if scales is None else scales.values,
        lse if scales is None else scales.mixed,
        keys.packed,
        keys.base,
        keys.count,
        keys.births,
        items,
        *numbers,
        0 if probabilities is None else probabilities.shape[2],
        float(power),
        2.0**-shift,
        **constants,
        VD=value_dim,
        BV=power_of_two(value_dim),
        HAS_SCALE=frozen.out_scale is not None,
        STORED=probabilities is not None,
        SCALED=scales is not None,
        SHRINKS=shift != 0,
        WIDE_VALUES=widened(values.dtype),
        BR=tile,
        **config,
    )
    return out
