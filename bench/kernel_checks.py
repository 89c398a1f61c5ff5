"""Every kernel against plain float64, on random inputs with odd sizes: what the tests run in the interpreter, and
``bench.gpu`` on a GPU before it times anything.

A check makes its inputs, poisons the outputs with NaN, runs a kernel and returns the largest error relative to the
largest element of the oracle.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from depass_fast.allocation import RULES, Gates
from depass_fast.backends.pieces import cut, make_piece, query_tiles
from depass_fast.backends.reference import attention_probabilities
from depass_fast.kernels import allocation, attention, gemm, launch, rows
from depass_fast.state import Components, Layout
from depass_fast.trace import AttentionTrace

LIMITS = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Check:
    """A kernel, what is special about the inputs, and the check itself: (dtype, device) -> error."""

    kernel: str
    case: str
    run: Callable[[torch.dtype, torch.device], float]


def poisoned(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An output that a partial write cannot pass for."""
    return torch.full(shape, float("nan") if dtype.is_floating_point else 7, dtype=dtype, device=device)


def error(out: Tensor, oracle: Tensor) -> float:
    """The largest difference, relative to the largest element; NaN counts as inf."""
    out, oracle = out.double().cpu(), oracle.double().cpu()
    worst = (out - oracle).abs().max() / oracle.abs().max().clamp_min(1e-30)
    return float(torch.nan_to_num(worst, nan=float("inf")))


def _random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _chunk(counts: list[int], device: torch.device, away: list[int] = ()) -> tuple:
    """One chunk of segments of these lengths, with some rows marked as special tokens away from home."""
    starts = np.concatenate([[0], np.cumsum(counts)])
    flags = torch.zeros(int(starts[-1]), dtype=torch.uint8)
    flags[list(away)] = 1
    return starts, torch.from_numpy(starts).to(device), flags.to(device) if len(away) else None


# -- rows -----------------------------------------------------------------------------------------------------------


def _check_read_rows(width: int, centred: bool, gather: bool) -> Callable:
    def run(dtype: torch.dtype, device: torch.device) -> float:
        layout = _tokens([5, 1, 7])
        x, weight = _random(0, layout.n_rows, width), _random(1, width)
        x[3] = 0
        part = (range(0, 1), 1, 4) if gather else (range(0, 3), 0, None)
        piece = make_piece(layout, *part, 16, 1, device)
        scale = _random(2, len(layout.counts)).abs() + 0.5
        source = _piece_rows(layout, *part)
        segment = torch.from_numpy(layout.row_segments())[source]
        oracle = x.double()[source]
        dead = (oracle == 0).all(1)
        oracle = oracle - oracle.mean(1, keepdim=True) if centred else oracle
        oracle = oracle * scale[segment, None] * weight
        out = poisoned(len(source), width, dtype=dtype, device=device)
        alive = poisoned(len(source), dtype=torch.uint8, device=device)
        rows.read_rows(
            x.to(device), piece.rows, scale.to(device)[piece.positions], weight.to(device), centred, out, alive
        )
        wrong = (alive.cpu() == 0) != dead
        return error(out, oracle) + float(wrong.any())

    return run


def _check_row_scales(width: int, centred: bool, picked: bool) -> Callable:
    def run(dtype: torch.dtype, device: torch.device) -> float:
        x = (3 + _random(0, 9, width)).to(dtype)
        at = torch.tensor([8, 0, 0, 5]) if picked else None
        oracle = x.double() if at is None else x[at].double()
        oracle = oracle - oracle.mean(1, keepdim=True) if centred else oracle
        oracle = torch.rsqrt(oracle.square().mean(1) + 1e-5)
        return error(rows.row_scales(x.to(device), None if at is None else at.to(device), 1e-5, centred), oracle)

    return run


def _check_add_rows(width: int) -> Callable:
    def run(dtype: torch.dtype, device: torch.device) -> float:
        layout = _tokens([5, 1, 7])
        part = (range(2, 3), 2, 6)
        piece, source = make_piece(layout, *part, 16, 1, device), _piece_rows(layout, *part)
        x, gained = _random(0, layout.n_rows, width), _random(1, len(source), width).to(dtype)
        oracle = x.double().index_add(0, source, gained.double())
        out = x.to(device)
        rows.add_rows(out, piece.rows, gained.to(device))
        return error(out, oracle)

    return run


def _check_read_out(n: int, width: int, k: int) -> Callable:
    def run(dtype: torch.dtype, device: torch.device) -> float:
        x, directions, scale = _random(0, n, width).to(dtype), _random(1, k, width), _random(2, 3)
        segment = torch.arange(n) % 3
        oracle = x.double() @ directions.double().T * scale.double()[segment, None]
        out = rows.read_out(x.to(device), directions.to(device), segment.int().to(device), scale.to(device))
        return error(out, oracle)

    return run


# -- attention --------------------------------------------------------------------------------------------------------


def _tokens(lengths: list[int], extras: int = 1) -> Layout:
    names = ("rest", "bias")[:extras]
    components = tuple(Components.tokens(tuple(map(str, range(n))), names, {0}) for n in lengths)
    return Layout.of(components, np.concatenate([[0], np.cumsum(lengths)]))


def _everywhere(lengths: list[int], m: int) -> Layout:
    components = tuple(Components.everywhere(tuple(map(str, range(m))), ()) for _ in lengths)
    return Layout.of(components, np.concatenate([[0], np.cumsum(lengths)]))


def _piece_rows(layout: Layout, prompts: range, first: int, last: int | None) -> Tensor:
    """Rows of the state that a piece holds, one after the other."""
    found = []
    for segment in range(len(layout.counts)):
        if layout.prompt[segment] in prompts:
            stop = layout.counts[segment] if last is None else min(last, layout.counts[segment])
            found += range(int(layout.starts[segment]) + first, int(layout.starts[segment] + stop))
    return torch.tensor(found, dtype=torch.long)


def _check_mix(
    layout: Layout, heads: int, kv: int, head_dim: int, max_rows: int = 1 << 20, value_dim: int | None = None,
    **mask: object,
) -> Callable:  # fmt: skip
    def run(dtype: torch.dtype, device: torch.device) -> float:
        n, v_dim = len(layout.packed), value_dim or head_dim
        of_trace = mask.get("of_trace", dtype)
        q, k = _random(0, n, heads, head_dim).to(of_trace), _random(1, n, kv, head_dim).to(of_trace)
        values = _random(2, layout.n_rows, kv * v_dim).to(dtype)
        options = {name: value for name, value in mask.items() if name != "of_trace"}
        key_bias = _random(3, n, heads) if options.pop("key_bias", False) else None
        out_scale = _random(4, n) if options.pop("out_scale", False) else None
        scale = head_dim**-0.5
        trace = AttentionTrace(resid=q, q=q, k=k, scale=scale, key_bias=key_bias, **options)
        oracle = torch.zeros(layout.n_rows, heads * v_dim, dtype=torch.float64)
        for prompt, components in enumerate(layout.components):
            at = layout.segments(prompt)
            dense = torch.zeros(at.stop - at.start, len(components), values.shape[1], dtype=torch.float64)
            alive = torch.arange(len(components)) < torch.from_numpy(layout.counts[at])[:, None]
            dense[alive] = values[layout.rows(prompt)].double()
            here = torch.from_numpy(layout.packed[at])
            p = attention_probabilities(trace, here, torch.arange(len(here)), torch.float64)
            v = dense.unflatten(-1, (kv, v_dim)).repeat_interleave(heads // kv, 2)
            mixed = torch.einsum("hqk,kmhd->qmhd", p, v).flatten(2)
            mixed = mixed if out_scale is None else mixed * out_scale[here].double()[:, None, None]
            oracle[layout.rows(prompt)] = mixed[alive]
        lengths = np.bincount(layout.prompt, minlength=len(layout.components))
        tile = launch.mix_tile(int(lengths.max()), heads // kv, torch.promote_types(dtype, of_trace))
        put = {"key_bias": key_bias, "out_scale": out_scale}
        put = {name: None if t is None else t.to(device) for name, t in put.items()}
        frozen = attention.Frozen(q.to(device), k.to(device), scale, **options, **put)
        packed = torch.from_numpy(layout.packed.astype(np.int32)).to(device)
        lse = attention.log_sum_exp(frozen, packed, query_tiles(lengths, tile, heads // kv, device), tile)
        worst, covered = 0.0, 0
        for part in cut(layout, max_rows):
            piece, source = make_piece(layout, *part, tile, heads // kv, device), _piece_rows(layout, *part)
            out = poisoned(len(source), heads * v_dim, dtype=dtype, device=device)
            attention.mix(values[source].to(device), piece.keys, piece.items, frozen, lse, tile, piece.longest, out)
            worst, covered = max(worst, error(out, oracle[source])), covered + len(source)
        return worst if covered == layout.n_rows else float("inf")

    return run


# -- allocation -------------------------------------------------------------------------------------------------------


def _gates(counts: list[int], n: int, dtype: torch.dtype, away: list[int], zeros: bool) -> Tensor:
    g = (_random(0, sum(counts), n) * 0.7).to(dtype)
    if zeros:
        g[::3] = 0  # a component that is not there
        g[:, n // 2] = 0  # a neuron that nobody drives
        g[1, 1:3] = 0
    return g


def _oracle(
    rule: str, g: Tensor, counts: list[int], act: Tensor, gate: Tensor, recorded: Tensor, alive: Tensor,
    away: list[int], constant: Tensor | None, bias: int | None, rest: int | None, temperature: float,
) -> Tensor:  # fmt: skip
    """Shares times activations in float64, by the plain rules."""
    out, start = torch.zeros(g.shape, dtype=torch.float64), 0
    excluded = torch.zeros(len(g), dtype=torch.bool)
    excluded[list(away)] = True
    for segment, count in enumerate(counts):
        at = slice(start, start + count)
        start += count
        if not count:
            continue
        values = g[at].double()[None].clone()
        if constant is not None:
            values[:, bias] += constant.double()
        total = gate[recorded[segment]].double()[None]
        gates = Gates(values, total, alive[None, at] != 0, excluded[None, at], torch.zeros(1), rest)
        out[at] = (RULES[rule](gates, temperature) * act[recorded[segment]].double())[0]
    return out


def _check_allocate(
    rule: str, counts: list[int], n: int, away: list[int] = (), zeros: bool = False, bias: int | None = None,
    rest: int | None = None, temperature: float = 0.1, scale: float = 1.0,
) -> Callable:  # fmt: skip
    def run(dtype: torch.dtype, device: torch.device) -> float:
        g = (_gates(counts, n, dtype, away, zeros) * scale).to(dtype)
        act, gate = _random(1, len(counts) + 2, n).to(dtype), _random(2, len(counts) + 2, n).to(dtype)
        gate[1, 0] = 0
        recorded = torch.arange(len(counts)).flip(0) + 2
        alive = (torch.arange(len(g)) % 5 != 1).to(torch.uint8)
        constant = _random(3, n) if bias is not None else None
        _, begins, flags = _chunk(counts, device, away)
        segments = allocation.Segments(begins, recorded.to(device), max(counts), flags, bias, rest)
        oracle = _oracle(rule, g, counts, act, gate, recorded, alive, away, constant, bias, rest, temperature)
        wide = poisoned(len(g), n + 3, dtype=dtype, device=device)  # rows that are not packed
        out = wide[:, :n].copy_(g)
        numbers = None if constant is None else constant.to(device)
        log_z = allocation.allocate(
            out, segments, act.to(device), gate.to(device), rule, temperature, alive.to(device), numbers,
            keep_z=rule == "softmax",
        )  # fmt: skip
        assert bool(wide[:, n:].isnan().all()), "written beside the gates"
        worst = error(out, oracle)
        if log_z is not None:
            worst = max(worst, _log_z_error(log_z, g, counts, away, constant, bias, temperature))
        return worst

    return run


def _log_z_error(
    log_z: Tensor, g: Tensor, counts: list[int], away: list[int], constant: Tensor | None, bias: int | None, t: float
) -> float:
    oracle, start = [], 0
    for count in counts:
        z = g[start : start + count].double().clone()
        if constant is not None and count:
            z[bias] += constant.double()
        z = (z / t).masked_fill(z == 0, -torch.inf)
        z[[i - start for i in away if start <= i < start + count]] = -torch.inf
        oracle.append(torch.logsumexp(z, 0) * 1.4426950408889634 if count else z.new_full(z.shape[1:], -torch.inf))
        start += count
    oracle, log_z = torch.stack(oracle), log_z.double().cpu()
    if not bool(((oracle == -torch.inf) == (log_z == -torch.inf)).all()):
        return float("inf")
    there = oracle != -torch.inf
    return float(((log_z - oracle)[there].abs() / oracle[there].abs().clamp_min(1)).amax()) if there.any() else 0.0


# -- the products with the allocation inside --------------------------------------------------------------------------


def row_tiles(starts: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Tiles of at most ``size`` rows that never cross a segment (t, 3), and the first of every segment (S + 1,)."""
    tiles, firsts = [], [0]
    for segment, (begin, end) in enumerate(pairwise(starts)):
        tiles += [(row, min(row + size, end), segment) for row in range(int(begin), int(end), size)]
        firsts.append(len(tiles))
    return np.array(tiles, np.int32).reshape(-1, 3), np.array(firsts, np.int32)


def _check_products(
    counts: list[int], width: int, n: int, away: list[int] = (), bias: int | None = None, rest: int | None = None
) -> Callable:
    def run(dtype: torch.dtype, device: torch.device) -> float:
        x = (_random(0, sum(counts), width) * width**-0.5).to(dtype)
        x[::4] = 0
        w_gate, w_down = (_random(1, n, width) * 0.3).to(dtype), (_random(2, width, n) * n**-0.5).to(dtype)
        act, state = _random(3, len(counts), n).to(dtype), _random(4, len(x), width)
        constant = _random(5, n) if bias is not None else None
        alive = (x != 0).any(1).to(torch.uint8)
        starts, begins, flags = _chunk(counts, device, away)
        tiles, firsts = row_tiles(starts, launch.product_config(dtype, device)["BM"])
        tiles, firsts = torch.from_numpy(tiles).to(device), torch.from_numpy(firsts).to(device)
        recorded = torch.arange(len(counts))
        g = poisoned(len(x), n, dtype=dtype, device=device)
        numbers = None if constant is None else constant.to(device)
        log_z = gemm.gate(
            x.to(device), w_gate.to(device), tiles, firsts, begins, 0.1, g, numbers, bias, flags
        )  # fmt: skip
        worst = error(g, x.double() @ w_gate.double().T)
        exact = g.cpu()
        worst = max(worst, _log_z_error(log_z, exact, counts, away, constant, bias, 0.1))
        shares = _oracle(
            "softmax", exact, counts, act, act, recorded, alive, list(away), constant, bias, rest, 0.1
        )  # fmt: skip
        fallback = torch.zeros(len(x))
        for begin, end in pairwise(starts):
            here = alive[begin:end].float()
            fallback[begin:end] = here / here.sum().clamp_min(1)
            if rest is not None and end > begin:
                fallback[begin:end] = 0
                fallback[begin + rest] = 1
        out = state.clone().to(device)
        gemm.down(
            out, g, w_down.to(device), act.to(device), recorded.to(device), log_z, tiles, begins, 0.1,
            fallback.to(device), numbers, bias, flags,
        )  # fmt: skip
        return max(worst, error(out, state.double() + shares @ w_down.double().T))

    return run


def checks(small: bool) -> Iterator[Check]:
    """Every kernel and corner; ``small``: sizes for the interpreter."""
    wide = 40 if small else 1000
    yield Check("read_rows", "scaled", _check_read_rows(wide + 7, False, False))
    yield Check("read_rows", "centred", _check_read_rows(wide + 7, True, False))
    yield Check("read_rows", "gathered", _check_read_rows(wide + 7, False, True))
    for centred, picked in ((False, False), (True, False), (False, True)):
        case = f"{'centred' if centred else 'plain'}, {'picked' if picked else 'all'}"
        yield Check("row_scales", case, _check_row_scales(wide + 7, centred, picked))
    yield Check("add_rows", "gathered", _check_add_rows(wide + 7))
    for n, k in ((1, 1), (21, 1), (21, 19)):
        yield Check("read_out", f"{n} rows, {k} directions", _check_read_out(n, wide + 7, k))

    scale = 1 if small else 9
    tokens, heads = _tokens([5, 1, 11 * scale, 3]), _everywhere([6 * scale, 3], 7)
    for name, layout in (("tokens", tokens), ("everywhere", heads), ("one", _tokens([1]))):
        yield Check("mix", name, _check_mix(layout, 4, 2, 24))
    yield Check("mix", "tokens in pieces", _check_mix(tokens, 4, 4, 16, max_rows=20 * scale**2))
    yield Check("mix", "one component at a time", _check_mix(_tokens([5, 4]), 2, 2, 16, max_rows=1))
    yield Check("mix", "window", _check_mix(tokens, 4, 2, 16, window=3))
    yield Check("mix", "cap", _check_mix(tokens, 4, 1, 16, softcap=0.7))
    yield Check("mix", "key bias, scaled", _check_mix(tokens, 3, 3, 16, key_bias=True, out_scale=True))
    long = _tokens([70 if small else 200])
    for of_trace in (torch.float32, torch.bfloat16):  # a model in one dtype, products in another
        name = str(of_trace).removeprefix("torch.")
        yield Check("mix", f"trace in {name}", _check_mix(tokens, 4, 2, 16, of_trace=of_trace))
    for wide, narrow in ((24, 16), (16, 40)):
        yield Check("mix", f"{wide} wide, values {narrow}", _check_mix(tokens, 4, 2, wide, value_dim=narrow))
    yield Check("mix", "many tiles, narrow values", _check_mix(long, 4, 4, 24, value_dim=16))
    yield Check("mix", "many tiles", _check_mix(long, 4, 2, 16, max_rows=1 << 20 if small else 5000))
    yield Check("mix", "many tiles, window", _check_mix(long, 2, 1, 16, window=9))
    if not small:
        for head_dim in (64, 80, 96, 128, 256):
            yield Check("mix", f"head_dim {head_dim}", _check_mix(_tokens([40, 130]), 4, 2, head_dim, max_rows=3000))

    counts = [3, 1, 9, 70, 2] if small else [3, 1, 9, 700, 64, 65, 2]
    n = 21 if small else 333
    for rule in allocation.RULES:
        yield Check("allocate", rule, _check_allocate(rule, counts, n))
        yield Check("allocate", f"{rule}, few", _check_allocate(rule, [3, 0, 1, 5], n))
        yield Check("allocate", f"{rule}, corners", _check_allocate(rule, counts, n, away=[3, 5, 6], zeros=True))
        corners = {"away": [0, 5, 6], "zeros": True, "bias": 0, "rest": 0}
        yield Check("allocate", f"{rule}, bias and rest", _check_allocate(rule, counts, n, **corners))
    yield Check("allocate", "one component", _check_allocate("softmax", [1], 1))
    yield Check("allocate", "cold", _check_allocate("softmax", [9, 70], n, temperature=0.01))
    yield Check("allocate", "loud", _check_allocate("softmax", [9, 70], n, scale=10.0))  # exponents up to 200

    sizes = ([3, 1, 70], 24, 40) if small else ([30, 1, 300, 128], 200, 333)
    yield Check("products", "plain", _check_products(*sizes))
    yield Check("products", "bias, rest, away", _check_products(*sizes, away=[0, 3, 5], bias=0, rest=0))
    yield Check("products", "alone", _check_products([1], *sizes[1:]))


def _errors(place: int, small: bool, device: str) -> list[float]:
    torch.set_num_threads(1)  # the oracle's, beside which others compile
    check = list(checks(small))[place]
    return [check.run(dtype, torch.device(device)) for dtype in LIMITS]


def verify(device: torch.device, small: bool = False, workers: int = 12) -> dict[tuple[str, torch.dtype], float]:
    """The worst error of every kernel in every dtype. On a GPU, ``workers`` processes compile.

    Raises:
        RuntimeError: an error is above its limit.
    """
    every = list(checks(small))
    if device.type == "cuda":
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            found = list(pool.map(_errors, range(len(every)), [small] * len(every), [str(device)] * len(every)))
    else:
        found = [_errors(i, small, str(device)) for i in range(len(every))]
    worst: dict[tuple[str, torch.dtype], float] = {}
    for check, errors in zip(every, found, strict=True):
        for (dtype, limit), value in zip(LIMITS.items(), errors, strict=True):
            if not value <= limit:
                raise RuntimeError(f"{check.kernel}, {check.case}, {dtype}: differs from float64 by {value:.1e}.")
            worst[check.kernel, dtype] = max(value, worst.get((check.kernel, dtype), 0.0))
    return worst
