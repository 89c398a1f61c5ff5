"""A layer's softmax allocation for the explicit rows of an adjoint sweep, with its crowds, and the way back through it.

A *start* is a start layer of the sweep. Its rows lie side by side: first the probe, then components that are carried
explicitly. Everyone else is its *crowd* (docs/adjoint.md, 2 and 3). For every start, position and neuron one pass over
the rows yields the crowd's mean gate, another one Z and the shares. κ needs the probe's gates at all neurons, so it
lies between two launches, as a partial result per block of neurons.

A row takes part where it is alive, `bias` also where it has a constant at that neuron. Gates are taken as they are: one
that was rounded to zero counts.
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

from .common import FLOATS, check
from .launch import crowd_config

_LEAST = tl.constexpr(1e-30)  # clamps denominators, as depass_fast.adjoint.crowd does
_LOWEST = tl.constexpr(-3.4028234663852886e38)  # float32's
_ROOT_EPS = tl.constexpr(2.0**-11.5)  # of float32's rounding


@dataclass(frozen=True, eq=False)
class StartRows:
    """The rows of S starts: ``first`` (S + 1,) int64 is every start's probe, ``longest`` the most rows of a start.

    ``rest`` and ``bias`` (S,) int32 are the places of these components within a start, -1 where there is none.
    """

    first: Tensor
    rest: Tensor
    bias: Tensor
    longest: int

    def __len__(self) -> int:
        return len(self.rest)


@dataclass(frozen=True, eq=False)
class CrowdTables:
    """The effect of a layer on its crowds: ``log_z``, ``share`` and ``mean`` (S, q, I), ``slope`` (S, q), float32.

    They may be parts of longer tables, the first three alike.
    """

    log_z: Tensor
    share: Tensor
    mean: Tensor
    slope: Tensor


@triton.jit
def _place(starts, n_queries, n_neurons, BI: tl.constexpr):
    """A program's start and query, its neurons [BI], and the start's first row and number of rows."""
    blocks = tl.cdiv(n_neurons, BI)
    place = tl.program_id(0) // blocks
    i = tl.program_id(0) % blocks * BI + tl.arange(0, BI)
    start = (place // n_queries).to(tl.int64)
    first = tl.load(starts + start)
    count = (tl.load(starts + start + 1) - first).to(tl.int32)
    return start, (place % n_queries).to(tl.int64), i, first, count


@triton.jit(do_not_specialize=["n_queries", "total_stride", "table_start", "count_start", "count_query"])
def _crowd_mean(
    g, total, constants, starts, bias, counts, mean, partial,
    n_queries, n_neurons, total_stride, table_start, table_query, count_start, count_query, per_t,
    HAS_CONSTANT: tl.constexpr, STAGES: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr,
):  # fmt: skip
    """The crowd's mean, and of a block of neurons: the probe's largest gate and its squares, the mean's largest."""
    start, query, i, first, count = _place(starts, n_queries, n_neurons, BI)
    inside = i < n_neurons
    m = tl.arange(0, BM)
    sums = tl.zeros((BM, BI), tl.float32)
    for t in tl.range(0, count, BM, num_stages=STAGES):
        row = ((first + t + m) * n_queries + query) * n_neurons  # [BM]
        explicit = (t + m > 0) & (t + m < count)
        sums += tl.load(g + row[:, None] + i[None, :], mask=explicit[:, None] & inside[None, :], other=0.0)
    lacking = tl.load(total + query * total_stride + i, mask=inside, other=0.0).to(tl.float32) - tl.sum(sums, 0)  # [BI]
    if HAS_CONSTANT:
        driven = tl.load(bias + start) >= 0
        lacking -= tl.where(driven, tl.load(constants + i, mask=inside, other=0.0), 0.0)
    number = tl.maximum(tl.load(counts + start * count_start + query * count_query), 1.0)
    average = tl.where(inside, lacking * per_t / number, 0.0)
    tl.store(mean + start * table_start + query * table_query + i, average, mask=inside)
    probe = tl.load(g + (first * n_queries + query) * n_neurons + i, mask=inside, other=0.0).to(tl.float32)
    loudest = tl.max(tl.abs(probe), 0)
    relative = probe / tl.where(loudest == 0, 1.0, loudest)  # squares alone may overflow
    at = partial + tl.program_id(0).to(tl.int64) * 3
    tl.store(at, loudest)
    tl.store(at + 1, tl.sum(relative * relative, 0))
    tl.store(at + 2, tl.max(tl.abs(average), 0))


@triton.jit
def _moment(partial, blocks, n_neurons, number, per_t, NB: tl.constexpr):
    """log κ of a crowd of ``number``, and the slope: `_moment` of depass_fast.adjoint.crowd."""
    b = tl.arange(0, NB)
    there = b < blocks
    at = partial + b * 3
    loudest = tl.load(at, mask=there, other=0.0)
    largest = tl.max(loudest, 0)
    relative = loudest / tl.where(largest == 0, 1.0, largest)
    squares = tl.sum(tl.load(at + 1, mask=there, other=0.0) * relative * relative, 0)
    spread = tl.sqrt(squares / n_neurons / number) * (largest * per_t)
    size = tl.max(tl.load(at + 2, mask=there, other=0.0), 0)
    most = tl.sqrt(2.0 * tl.log(number))
    bounded = tl.minimum(spread, most)
    told = tl.maximum(tl.maximum(spread, size * _ROOT_EPS), _LEAST)
    return bounded * (spread - bounded / 2), tl.maximum(tl.minimum(told, most), _LEAST) / told


@triton.jit
def _exponents(
    g, alive, constant, first, query, n_queries, n_neurons, alive_stride, m, count, i, inside, bias, per_t,
    HAS_CONSTANT: tl.constexpr,
):  # fmt: skip
    """g / T of explicit rows m, -inf for those that take no part: [BM, BI]."""
    row = first + m  # [BM]
    explicit = (m > 0) & (m < count)
    there = explicit[:, None] & inside[None, :]
    where = (row * n_queries + query) * n_neurons
    values = tl.load(g + where[:, None] + i[None, :], mask=there, other=0.0).to(tl.float32)
    part = there & (tl.load(alive + row * alive_stride + query, mask=explicit, other=0) != 0)[:, None]
    if HAS_CONSTANT:
        mine = (m == bias)[:, None] & there
        values += tl.where(mine, constant[None, :], 0.0)
        part = part | (mine & (constant != 0)[None, :])
    return tl.where(part, values * per_t, float("-inf"))


@triton.jit(
    do_not_specialize=["n_queries", "act_stride", "alive_stride", "slope_start", "table_start", "count_start",
                       "count_query"]
)  # fmt: skip
def _crowd_share(
    g, alive, act, constants, starts, rest, bias, counts, partial, log_z, share, mean, slope,
    n_queries, n_neurons, act_stride, alive_stride, slope_start, table_start, table_query, count_start, count_query,
    per_t,
    HAS_CONSTANT: tl.constexpr, ONE_TILE: tl.constexpr, STAGES: tl.constexpr, NB: tl.constexpr, BM: tl.constexpr,
    BI: tl.constexpr,
):  # fmt: skip
    """Replace gates by shares of the activation, and write what the layer does to the crowd."""
    start, query, i, first, count = _place(starts, n_queries, n_neurons, BI)
    inside = i < n_neurons
    blocks = tl.cdiv(n_neurons, BI)
    place = start * n_queries + query
    crowd = tl.load(counts + start * count_start + query * count_query)
    number = tl.maximum(crowd, 1.0)
    log_kappa, inclination = _moment(partial + place * blocks * 3, blocks, n_neurons, number, per_t, NB)
    if tl.program_id(0) % blocks == 0:
        tl.store(slope + start * slope_start + query, inclination)
    table = start * table_start + query * table_query + i
    average = tl.load(mean + table, mask=inside, other=0.0)
    term = average + (log_kappa + tl.log(number))  # [BI] the crowd's in log Z
    a = tl.load(act + query * act_stride + i, mask=inside, other=0.0).to(tl.float32)
    constant = a
    if HAS_CONSTANT:
        constant = tl.load(constants + i, mask=inside, other=0.0)
    resting, biased = tl.load(rest + start), tl.load(bias + start)
    m = tl.arange(0, BM)
    level = tl.where(crowd > 0, term, _LOWEST)
    if ONE_TILE:
        z = _exponents(
            g, alive, constant, first, query, n_queries, n_neurons, alive_stride, m, count, i, inside, biased, per_t,
            HAS_CONSTANT,
        )  # fmt: skip
        top = tl.maximum(tl.max(z, 0), level)
        total = tl.sum(tl.exp(z - top[None, :]), 0)
    else:  # each place of the tile has its own maximum and sum: no thread waits
        tops = tl.zeros((BM, BI), tl.float32) + level[None, :]
        sums = tl.zeros((BM, BI), tl.float32)
        for t in tl.range(0, count, BM, num_stages=STAGES):
            z = _exponents(
                g, alive, constant, first, query, n_queries, n_neurons, alive_stride, t + m, count, i, inside, biased,
                per_t, HAS_CONSTANT,
            )  # fmt: skip
            e = tl.exp(-tl.abs(z - tops))  # the smaller of the two in units of the larger
            sums = tl.where(z > tops, sums * e + 1.0, sums + e)
            tops = tl.maximum(tops, z)
        top = tl.max(tops, 0)
        total = tl.sum(sums * tl.exp(tops - top[None, :]), 0)
    own = tl.exp(tl.where(crowd > 0, term - top, float("-inf")))
    total += own
    nobody = total == 0
    total = tl.where(nobody, 1.0, total)
    each = own / total / number
    probe_at = g + (first * n_queries + query) * n_neurons + i
    probe = tl.load(probe_at, mask=inside, other=0.0).to(tl.float32) * per_t
    tl.store(probe_at, (probe * each * inclination * a).to(g.dtype.element_ty), mask=inside)
    tl.store(log_z + table, tl.where(nobody, float("inf"), tl.log(total) + top), mask=inside)
    even = nobody & (resting < 0)  # without `rest` the crowd has what nobody drives
    tl.store(share + table, tl.where(even, 1.0 / number, each), mask=inside)
    tl.store(mean + table, tl.where(even, 0.0, average), mask=inside)
    factor = a / total
    for t in range(0, count, BM):
        if not ONE_TILE:
            z = _exponents(
                g, alive, constant, first, query, n_queries, n_neurons, alive_stride, t + m, count, i, inside, biased,
                per_t, HAS_CONSTANT,
            )  # fmt: skip
        taken = tl.exp(z - top[None, :]) * factor[None, :]
        taken = tl.where((t + m == resting)[:, None] & nobody[None, :], a[None, :], taken)
        row = ((first + t + m) * n_queries + query) * n_neurons
        explicit = (t + m > 0) & (t + m < count)
        there = explicit[:, None] & inside[None, :]
        tl.store(g + row[:, None] + i[None, :], taken.to(g.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["n_queries", "targets", "act_stride", "slope_start", "table_start", "offset_stride"])
def _crowd_back(
    y, act, share, mean, slope, offsets,
    n_queries, n_neurons, targets, act_stride, slope_start, table_start, table_query, offset_stride, per_t,
    BI: tl.constexpr,
):  # fmt: skip
    """Take a gradient of shares to one of gates, and add up what a component receives where its gates are zero."""
    row = tl.program_id(0).to(tl.int64)
    query, start = row % n_queries, row // n_queries // targets
    table = start * table_start + query * table_query
    inclination = tl.load(slope + start * slope_start + query)
    factor = inclination * per_t
    sums = tl.zeros((BI,), tl.float32)
    for first in range(0, n_neurons, BI):
        i = first + tl.arange(0, BI)
        inside = i < n_neurons
        a = tl.load(act + query * act_stride + i, mask=inside, other=0.0).to(tl.float32)
        at = y + row * n_neurons + i
        gained = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        gained *= tl.load(share + table + i, mask=inside, other=0.0) * a
        tl.store(at, (gained * factor).to(y.dtype.element_ty), mask=inside)
        sums += gained * (1.0 - inclination * tl.load(mean + table + i, mask=inside, other=0.0))
    at = offsets + row // n_queries * offset_stride + query
    tl.store(at, tl.load(at) + tl.sum(sums, 0))


def share_with_crowds(
    g: Tensor,
    explicit: StartRows,
    alive: Tensor,
    counts: Tensor,
    act: Tensor,
    total: Tensor,
    temperature: float,
    tables: CrowdTables,
    constant: Tensor | None = None,
) -> None:
    """Replace gates by shares of the frozen activation, in place: g (R, q, I); write the crowds' ``tables``.

    ``alive`` (R, q) uint8 is zero for rows that are not there, ``counts`` (S, q) float32 says how many of every crowd
    are; its elements may be repeated. ``act`` and ``total`` (q, I) are the frozen activations and gates (no float64),
    ``constant`` (I,) float32 the gate's bias, which `bias` drives.

    Raises:
        ValueError: a tensor of another shape, dtype or memory layout.
    """
    check("g", g, (None, None, None), *FLOATS)
    n_rows, n_queries, n_neurons = g.shape
    check("alive", alive, (n_rows, n_queries), torch.uint8, spaced=True)
    for name, x in (("act", act), ("total", total)):
        check(name, x, (n_queries, n_neurons), *FLOATS, spaced=True)
    if constant is not None:
        check("constant", constant, (n_neurons,), torch.float32)
    _check_rows(explicit)
    _check_tables(tables, len(explicit), n_queries, n_neurons)
    if counts.shape != (len(explicit), n_queries) or counts.dtype != torch.float32:
        raise ValueError(f"counts: expected float32 of shape {(len(explicit), n_queries)}; got {tuple(counts.shape)}.")
    if not g.numel():
        return
    config = crowd_config(explicit.longest, n_neurons, g.dtype)
    one = config.pop("ONE_TILE")
    blocks = triton.cdiv(n_neurons, config["BI"])
    partial = torch.empty(len(explicit) * n_queries * blocks, 3, dtype=torch.float32, device=g.device)
    constants, has = act if constant is None else constant, constant is not None
    grid = (len(explicit) * n_queries * blocks,)
    table = (tables.mean.stride(0), tables.mean.stride(1), counts.stride(0), counts.stride(1), 1.0 / temperature)
    _crowd_mean[grid](
        g, total, constants, explicit.first, explicit.bias, counts, tables.mean, partial,
        n_queries, n_neurons, total.stride(0), *table,
        HAS_CONSTANT=has, **config,
    )  # fmt: skip
    _crowd_share[grid](
        g, alive, act, constants, explicit.first, explicit.rest, explicit.bias, counts, partial,
        tables.log_z, tables.share, tables.mean, tables.slope,
        n_queries, n_neurons, act.stride(0), alive.stride(0), tables.slope.stride(0), *table,
        HAS_CONSTANT=has, ONE_TILE=one, NB=triton.next_power_of_2(blocks), **config,
    )  # fmt: skip


def gradients_of_gates(y: Tensor, act: Tensor, temperature: float, tables: CrowdTables, offsets: Tensor) -> None:
    """Take gradients of shares back to gates: y (S, K, q, I) <- y · share · act · slope / T, in place.

    A component of a crowd receives share · act · (1 - slope · mean + slope · g / T). The sum of what it receives where
    its gates are zero is added to ``offsets`` (S, K, q) float32, which may be some of more positions.

    Raises:
        ValueError: a tensor of another shape, dtype or memory layout.
    """
    check("y", y, (None, None, None, None), *FLOATS)
    starts, targets, n_queries, n_neurons = y.shape
    check("act", act, (n_queries, n_neurons), *FLOATS, spaced=True)
    _check_tables(tables, starts, n_queries, n_neurons)
    check("offsets", offsets, (starts, targets, n_queries), torch.float32, spaced=True)
    if offsets.stride(0) != targets * offsets.stride(1):
        raise ValueError(f"offsets: expected targets at equal distances; got strides {offsets.stride()}.")
    if not y.numel():
        return
    columns = min(1024, triton.next_power_of_2(n_neurons))
    _crowd_back[(starts * targets * n_queries,)](
        y, act, tables.share, tables.mean, tables.slope, offsets,
        n_queries, n_neurons, targets, act.stride(0), tables.slope.stride(0), *tables.mean.stride()[:2],
        offsets.stride(1), 1.0 / temperature,
        BI=columns, num_warps=4,
    )  # fmt: skip


def _check_rows(rows: StartRows) -> None:
    check("first", rows.first, (len(rows) + 1,), torch.int64)
    check("rest", rows.rest, (None,), torch.int32)
    check("bias", rows.bias, (len(rows),), torch.int32)


def _check_tables(tables: CrowdTables, starts: int, n_queries: int, n_neurons: int) -> None:
    for name in ("log_z", "share", "mean"):
        table = getattr(tables, name)
        check(name, table, (starts, n_queries, n_neurons), torch.float32, spaced=True)
        if table.stride() != tables.mean.stride():
            raise ValueError(f"{name}: expected the strides of mean, {tables.mean.stride()}; got {table.stride()}.")
    check("slope", tables.slope, (starts, n_queries), torch.float32, spaced=True)
