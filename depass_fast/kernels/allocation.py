"""Softmax neuron allocation, and the other rules: a segmented reduction over the components of every position.

For every position and neuron the gates g of all components are read twice: once to find their maximum and sum,
streaming over the components, and once to be replaced by w · a, the component's share of the frozen activation
(DESIGN.md section 2, *MLP*). A component that is not there takes no part, nor does a special token away from home.
Where nobody is eligible, `rest` takes all, or those alive share evenly.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (Triton declares a kernel's constants as `constexpr` and gets numbers; num_warps is no parameter of a kernel)

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import FLOATS, LOG2E, check
from .launch import allocation_config

_FINITE = torch.finfo(torch.float32)
RULES = ("softmax", "linear", "relu", "max")


@dataclass(frozen=True, eq=False)
class Segments:
    """The positions of a chunk: ``starts`` (S + 1,) int64 first rows, ``recorded`` (S,) int64 rows of the trace.

    ``away`` (r,) uint8 marks special tokens away from home, or is None; ``longest`` is the largest segment's length;
    ``bias`` and ``rest`` are these components' places within a segment, or None.
    """

    starts: Tensor
    recorded: Tensor
    longest: int
    away: Tensor | None = None
    bias: int | None = None
    rest: int | None = None

    def __len__(self) -> int:
        return len(self.recorded)


@triton.jit
def _tile(
    g, row_scale, constant, first, m, count, i, inside, stride, bias,
    HAS_ROW_SCALE: tl.constexpr, HAS_CONSTANT: tl.constexpr,
):  # fmt: skip
    """Gates of components m and neurons i: [BM, BI]."""
    row = first + m
    there = (m < count)[:, None] & inside[None, :]
    values = tl.load(g + row[:, None] * stride + i[None, :], mask=there, other=0.0).to(tl.float32)
    if HAS_ROW_SCALE:
        values *= tl.load(row_scale + row, mask=m < count, other=0.0)[:, None]
    if HAS_CONSTANT:
        values += tl.where((m == bias)[:, None], constant[None, :], 0.0)
    return values


@triton.jit
def _present(alive, away, first, m, count, HAS_AWAY: tl.constexpr):
    """The components m that take part: those alive, but no special token away from home: [BM]."""
    row = first + m
    here = tl.load(alive + row, mask=m < count, other=0) != 0
    if HAS_AWAY:
        here = here & (tl.load(away + row, mask=m < count, other=1) == 0)
    return here


@triton.jit
def _part(here, driven, m, bias, HAS_CONSTANT: tl.constexpr):
    """A mask of those that take part, [BM, 1] or [BM, BI]: `bias` also where it is ``driven`` by a constant."""
    part = here[:, None]
    if HAS_CONSTANT:
        part = part | ((m == bias)[:, None] & driven[None, :])
    return part


@triton.jit(do_not_specialize=["away", "recorded", "out_factor", "bias", "rest"])
def _allocate(
    g,
    row_scale,
    act,
    constants,
    away,
    alive,
    starts,
    recorded,
    n_neurons,
    stride,
    act_stride,
    per_t,
    out_factor,
    bias,
    rest,
    RULE: tl.constexpr,
    HAS_ROW_SCALE: tl.constexpr,
    HAS_CONSTANT: tl.constexpr,
    HAS_AWAY: tl.constexpr,
    HAS_REST: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BM: tl.constexpr,
    BI: tl.constexpr,
    STAGES: tl.constexpr,
):
    blocks = tl.cdiv(n_neurons, BI)
    segment = tl.program_id(0) // blocks
    i = tl.program_id(0) % blocks * BI + tl.arange(0, BI)
    inside = i < n_neurons
    first = tl.load(starts + segment)
    count = (tl.load(starts + segment + 1) - first).to(tl.int32)
    at = tl.load(recorded + segment) * act_stride + i
    a = tl.load(act + at, mask=inside, other=0.0).to(tl.float32) * out_factor  # [BI]
    constant = a
    if HAS_CONSTANT:
        constant = tl.load(constants + i, mask=inside, other=0.0).to(tl.float32)
    driven = constant != 0
    m = tl.arange(0, BM)
    NEVER: tl.constexpr = float("-inf")
    # no gate is below it, and -inf less itself would be NaN; times `per_t` it may be -inf, and 2^-inf = 0 is meant
    LOWEST: tl.constexpr = -3.4028234663852886e38
    top = tl.full((BI,), LOWEST, tl.float32)  # the largest that takes part
    low = tl.full((BI,), float("inf"), tl.float32)
    total = tl.zeros((BI,), tl.float32)
    best = tl.zeros((BI,), tl.int32)  # `max`: the component that has it
    spoiled = tl.zeros((BI,), tl.int32)  # `max`: a gate is NaN
    someone = tl.zeros((BM,), tl.int32)
    if RULE == "softmax" and not ONE_TILE:  # each place of the tile has its own maximum and sum: no thread waits
        tops = tl.full((BM, BI), LOWEST, tl.float32)
        sums = tl.zeros((BM, BI), tl.float32)
    if ONE_TILE:
        values = _tile(g, row_scale, constant, first, m, count, i, inside, stride, bias, HAS_ROW_SCALE, HAS_CONSTANT)
        here = _present(alive, away, first, m, count, HAS_AWAY)
        part = _part(here, driven, m, bias, HAS_CONSTANT)
    for t in tl.range(0, count, BM, num_stages=STAGES):
        if not ONE_TILE:
            values = _tile(
                g, row_scale, constant, first, t + m, count, i, inside, stride, bias, HAS_ROW_SCALE, HAS_CONSTANT
            )
            here = _present(alive, away, first, t + m, count, HAS_AWAY)
            part = _part(here, driven, t + m, bias, HAS_CONSTANT)
        someone |= here.to(tl.int32)
        if RULE == "softmax" and ONE_TILE:
            z = tl.where(part, values, NEVER)
            top = tl.maximum(top, tl.max(z, 0))
            total = tl.sum(tl.exp2((z - top[None, :]) * per_t), 0)
        elif RULE == "softmax":
            z = tl.where(part, values, NEVER)
            e = tl.exp2(-tl.abs(z - tops) * per_t)  # the smaller of the two in units of the larger
            sums = tl.where(z > tops, sums * e + 1.0, sums + e)
            tops = tl.maximum(tops, z)
        elif RULE == "relu":
            total += tl.sum(tl.where(part & ~(values <= 0), values, 0.0), 0)  # NaN is kept
        elif RULE == "linear":
            top = tl.maximum(top, tl.max(tl.where(part, values, NEVER), 0))
            low = tl.minimum(low, tl.min(tl.where(part, values, float("inf")), 0))
        else:
            z = tl.where(part, values, NEVER)
            high = tl.max(z, 0)
            who = t + tl.min(tl.where(z == high[None, :], m[:, None], BM), 0)  # the first of equals
            best = tl.where(high > top, who, best)
            top = tl.maximum(top, high)
            spoiled = tl.maximum(spoiled, tl.max((z != z).to(tl.int32), 0))
    if RULE == "softmax" and not ONE_TILE:
        top = tl.max(tops, 0)
        total = tl.sum(sums * tl.exp2((tops - top[None, :]) * per_t), 0)
    nobody = tl.full((BI,), tl.max(someone, 0), tl.int32) == 0
    if HAS_CONSTANT:
        nobody = nobody & ~driven
    even = tl.where(top == low, 1.0, 0.0)  # `linear`: all equal, unless one is NaN
    if RULE == "linear":
        for t in tl.range(0, count, BM, num_stages=STAGES):
            if not ONE_TILE:
                values = _tile(
                    g, row_scale, constant, first, t + m, count, i, inside, stride, bias, HAS_ROW_SCALE, HAS_CONSTANT
                )
                here = _present(alive, away, first, t + m, count, HAS_AWAY)
                part = _part(here, driven, t + m, bias, HAS_CONSTANT)
            total += tl.sum(tl.where(part, values - low[None, :] + even[None, :], 0.0), 0)
    if RULE == "relu":
        nobody = total == 0
    factor = a
    if RULE != "max":  # one factor for the whole column
        factor = a / tl.where(nobody | ~inside, 1.0, total)
    lost = tl.max((nobody & inside).to(tl.int32), 0) > 0
    n_alive = 0.0
    if not HAS_REST:  # noqa: SIM102 (compiled in; `lost` is not)
        if lost:
            for t in range(0, count, BM):
                n_alive += tl.sum(tl.load(alive + first + t + m, mask=t + m < count, other=0).to(tl.float32), 0)
    for t in tl.range(0, count, BM, num_stages=STAGES):
        if not ONE_TILE:
            values = _tile(
                g, row_scale, constant, first, t + m, count, i, inside, stride, bias, HAS_ROW_SCALE, HAS_CONSTANT
            )
            here = _present(alive, away, first, t + m, count, HAS_AWAY)
            part = _part(here, driven, t + m, bias, HAS_CONSTANT)
        if RULE == "softmax":
            shares = tl.exp2((tl.where(part, values, NEVER) - top[None, :]) * per_t) * factor[None, :]
        elif RULE == "relu":
            shares = tl.where(part & ~(values <= 0), values, 0.0) * factor[None, :]
        elif RULE == "linear":
            shares = tl.where(part, values - low[None, :] + even[None, :], 0.0) * factor[None, :]
        else:
            shares = tl.where((t + m)[:, None] == best[None, :], a[None, :], 0.0)
            shares = tl.where((spoiled > 0)[None, :], float("nan"), shares)
        if lost:
            if HAS_REST:
                fallback = tl.where(t + m == rest, 1.0, 0.0)
            else:
                is_alive = tl.load(alive + first + t + m, mask=t + m < count, other=0).to(tl.float32)
                fallback = is_alive / tl.maximum(n_alive, 1.0)
            shares = tl.where(nobody[None, :], fallback[:, None] * a[None, :], shares)
        where = g + (first + t + m)[:, None] * stride + i[None, :]
        tl.store(where, shares.to(g.dtype.element_ty), mask=(t + m < count)[:, None] & inside[None, :])


def allocate(
    g: Tensor,
    segments: Segments,
    act: Tensor,
    rule: str,
    temperature: float,
    alive: Tensor,
    constant: Tensor | None = None,
    row_scale: Tensor | None = None,
    out_factor: float = 1.0,
) -> None:
    """Replace gates by shares of the frozen activation, in place: g (r, i) <- w · a.

    ``act`` (P, i) is the trace's. ``constant`` (i,) is the gate's bias, which `bias` drives. ``alive`` (r,) uint8 is
    zero for components that are not there. The rows of ``g`` and ``act`` may be parts of longer ones.

    With ``row_scale`` (r,) float32 the gates are ``g`` · ``row_scale``. Shares are stored times ``out_factor``.

    Raises:
        ValueError: an unknown rule, or a tensor of another shape, dtype or memory layout.
    """
    check("g", g, (None, None), *FLOATS, spaced=True)
    n_rows, n_neurons = g.shape
    check("act", act, (None, n_neurons), *FLOATS, spaced=True)
    check("alive", alive, (n_rows,), torch.uint8)
    check("starts", segments.starts, (len(segments) + 1,), torch.int64)
    check("recorded", segments.recorded, (None,), torch.int64)
    if segments.away is not None:
        check("away", segments.away, (n_rows,), torch.uint8)
    if constant is not None:
        check("constant", constant, (n_neurons,), *FLOATS)
        if segments.bias is None:
            raise ValueError("constant: it is driven by `bias`, and the segments have none.")
    if row_scale is not None:
        check("row_scale", row_scale, (n_rows,), torch.float32)
    if rule not in RULES:
        raise ValueError(f"rule: {rule!r} is not one of {', '.join(RULES)}.")
    if not g.numel():
        return
    config = allocation_config(segments.longest, n_neurons, g.dtype, g.device)
    grid = (len(segments) * triton.cdiv(n_neurons, config["BI"]),)
    common = (segments.starts, segments.recorded, n_neurons, g.stride(0), act.stride(0))
    scales = act if row_scale is None else row_scale
    constants, bias = act if constant is None else constant, -1 if segments.bias is None else segments.bias
    _allocate[grid](
        g,
        scales,
        act,
        constants,
        alive if segments.away is None else segments.away,
        alive,
        *common,
        min(max(LOG2E / temperature, _FINITE.tiny), _FINITE.max),
        out_factor,
        bias,
        -1 if segments.rest is None else segments.rest,
        RULE=rule,
        HAS_ROW_SCALE=row_scale is not None,
        HAS_CONSTANT=constant is not None,
        HAS_AWAY=segments.away is not None,
        HAS_REST=segments.rest is not None,
        **config,
    )
