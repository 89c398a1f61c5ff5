"""Every kernel against plain float64, on random inputs with odd sizes: what the tests run in the interpreter, and
``bench.gpu`` on a GPU before it times anything.

A check makes its inputs, poisons the outputs with NaN, runs a kernel and returns the largest error relative to the
largest element of the oracle.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from depass_fast.allocation import RULES, Gates
from depass_fast.backends.triton.pieces import make_piece
from depass_fast.kernels import allocation, gemm, launch, rows

from .attention_checks import attention_checks
from .checking import LIMITS, Check, error, piece_rows, poisoned, random, tokens


def _chunk(counts: list[int], device: torch.device, away: list[int] = ()) -> tuple:
    """One chunk of segments of these lengths, with some rows marked as special tokens away from home."""
    starts = np.concatenate([[0], np.cumsum(counts)])
    flags = torch.zeros(int(starts[-1]), dtype=torch.uint8)
    flags[list(away)] = 1
    return starts, torch.from_numpy(starts).to(device), flags.to(device) if len(away) else None


# -- rows -----------------------------------------------------------------------------------------------------------


def _check_read_rows(width: int, centred: bool, gather: bool) -> Callable:
    def run(dtype: torch.dtype, device: torch.device) -> float:
        layout = tokens([5, 1, 7])
        x, weight = random(0, layout.n_rows, width), random(1, width)
        x[3] = 0
        part = (range(0, 1), 1, 4) if gather else (range(0, 3), 0, None)
        piece = make_piece(layout, *part, 16, 1, device)
        scale = random(2, len(layout.counts)).abs() + 0.5
        source = piece_rows(layout, *part)
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
        x = (3 + random(0, 9, width)).to(dtype)
        at = torch.tensor([8, 0, 0, 5]) if picked else None
        oracle = x.double() if at is None else x[at].double()
        oracle = oracle - oracle.mean(1, keepdim=True) if centred else oracle
        oracle = torch.rsqrt(oracle.square().mean(1) + 1e-5)
        return error(rows.row_scales(x.to(device), None if at is None else at.to(device), 1e-5, centred), oracle)

    return run


def _check_add_rows(width: int) -> Callable:
    def run(dtype: torch.dtype, device: torch.device) -> float:
        layout = tokens([5, 1, 7])
        part = (range(2, 3), 2, 6)
        piece, source = make_piece(layout, *part, 16, 1, device), piece_rows(layout, *part)
        x, gained = random(0, layout.n_rows, width), random(1, len(source), width).to(dtype)
        oracle = x.double().index_add(0, source, gained.double())
        out = x.to(device)
        rows.add_rows(out, piece.rows, gained.to(device))
        return error(out, oracle)

    return run


def _check_read_out(n: int, width: int, k: int) -> Callable:
    def run(dtype: torch.dtype, device: torch.device) -> float:
        x, directions, scale = random(0, n, width).to(dtype), random(1, k, width), random(2, 3)
        segment = torch.arange(n) % 3
        oracle = x.double() @ directions.double().T * scale.double()[segment, None]
        out = rows.read_out(x.to(device), directions.to(device), segment.int().to(device), scale.to(device))
        return error(out, oracle)

    return run


# -- allocation -------------------------------------------------------------------------------------------------------


def _gates(counts: list[int], n: int, dtype: torch.dtype, away: list[int], zeros: bool) -> Tensor:
    g = (random(0, sum(counts), n) * 0.7).to(dtype)
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
    rest: int | None = None, temperature: float = 0.1, scale: float = 1.0, equal: bool = False,
) -> Callable:  # fmt: skip
    def run(dtype: torch.dtype, device: torch.device) -> float:
        g = (_gates(counts, n, dtype, away, zeros) * scale).to(dtype)
        g = g.sign() if equal else g
        act, gate = random(1, len(counts) + 2, n).to(dtype), random(2, len(counts) + 2, n).to(dtype)
        gate[2, 0] = 0  # the last segment's
        recorded = torch.arange(len(counts)).flip(0) + 2
        alive = (torch.arange(len(g)) % 5 != 1).to(torch.uint8)
        constant = random(3, n) if bias is not None else None
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
        x = (random(0, sum(counts), width) * width**-0.5).to(dtype)
        x[::4] = 0
        w_gate, w_down = (random(1, n, width) * 0.3).to(dtype), (random(2, width, n) * n**-0.5).to(dtype)
        act, state = random(3, len(counts), n).to(dtype), random(4, len(x), width)
        constant = random(5, n) if bias is not None else None
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

    yield from attention_checks(small)

    counts = [3, 1, 9, 70, 2] if small else [3, 1, 9, 700, 64, 65, 2]
    n = 21 if small else 333
    for rule in allocation.RULES:
        yield Check("allocate", rule, _check_allocate(rule, counts, n))
        yield Check("allocate", f"{rule}, few", _check_allocate(rule, [3, 0, 1, 5], n))
        yield Check("allocate", f"{rule}, corners", _check_allocate(rule, counts, n, away=[3, 5, 6], zeros=True))
        corners = {"away": [0, 5, 6], "zeros": True, "bias": 0, "rest": 0}
        yield Check("allocate", f"{rule}, bias and rest", _check_allocate(rule, counts, n, **corners))
    yield Check("allocate", "max, equals", _check_allocate("max", [40], 5, equal=True))  # in two tiles
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
