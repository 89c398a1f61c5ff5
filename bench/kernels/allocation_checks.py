"""The allocation's kernels against the plain rules in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from depass_fast.allocation import RULES, Gates
from depass_fast.kernels import allocation

from .checking import Check, error, poisoned, random


def chunk(
    counts: list[int], device: torch.device, away: Sequence[int] = ()
) -> tuple[np.ndarray, Tensor, Tensor | None]:
    """The first rows of segments of these lengths, on the host and the device, and the flags of rows ``away``."""
    starts = np.concatenate([[0], np.cumsum(counts)])
    flags = torch.zeros(int(starts[-1]), dtype=torch.uint8)
    flags[list(away)] = 1
    return starts, torch.from_numpy(starts).to(device), flags.to(device) if len(away) else None


def _gates(counts: list[int], n: int, dtype: torch.dtype, away: Sequence[int], zeros: bool) -> Tensor:
    g = (random(0, sum(counts), n) * 0.7).to(dtype)
    if zeros:
        g[::3] = 0  # a component that is not there, see _alive
        g[:, n // 2] = 0  # a neuron that nobody drives
        g[1, 1:3] = 0  # one that rounds to zero
    return g


def _alive(n_rows: int, zeros: bool) -> Tensor:
    alive = torch.arange(n_rows) % 5 != 1
    if zeros:
        alive[::3] = False
    return alive.to(torch.uint8)


def allocation_oracle(
    rule: str, g: Tensor, counts: list[int], act: Tensor, recorded: Tensor, alive: Tensor,
    away: Sequence[int], constant: Tensor | None, bias: int | None, rest: int | None, temperature: float,
) -> Tensor:  # fmt: skip
    """The shares times the activations in float64, by the plain rules of depass_fast.allocation."""
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
        there, gone = alive[None, at] != 0, excluded[None, at]
        gates = Gates(values, values.sum(1), there, gone, torch.zeros(1), rest, bias, constant)
        out[at] = (RULES[rule](gates, temperature) * act[recorded[segment]].double())[0]
    return out


def _check_allocate(
    rule: str, counts: list[int], n: int, away: Sequence[int] = (), zeros: bool = False, bias: int | None = None,
    rest: int | None = None, temperature: float = 0.1, scale: float = 1.0, equal: bool = False,
    scaled: bool = False, nan: bool = False,
) -> Callable:  # fmt: skip
    """Check `allocate`. ``scaled``: gates of rows with scales of their own, and shares times a factor.

    ``nan``: some gates are NaN, and so are the shares of their position and neuron, but no others.
    """

    def run(dtype: torch.dtype, device: torch.device) -> float:
        g = (_gates(counts, n, dtype, away, zeros) * scale).to(dtype)
        g = g.sign() if equal else g
        if nan:
            g[:, 1] = 1  # equal to each other
            g[::4, 1::3] = torch.nan
        act = random(1, len(counts) + 2, n).to(dtype)
        recorded = torch.arange(len(counts)).flip(0) + 2
        alive = _alive(len(g), zeros)
        constant = random(3, n) if bias is not None else None
        if constant is not None:
            constant[::4] = 0
        size = (2 * random(4, len(g))).round().exp2() if scaled else None
        out_factor = 2.0**-7 if scaled else 1.0
        true = g if size is None else g.double() * size[:, None].double()
        _, begins, flags = chunk(counts, device, away)
        segments = allocation.Segments(begins, recorded.to(device), max(counts), flags, bias, rest)
        oracle = allocation_oracle(rule, true, counts, act, recorded, alive, away, constant, bias, rest, temperature)
        wide = poisoned(len(g), n + 3, dtype=dtype, device=device)  # rows that are not packed
        out = wide[:, :n].copy_(g)
        numbers = None if constant is None else constant.to(device)
        scales = None if size is None else size.to(device)
        more = (alive.to(device), numbers, scales, out_factor)
        allocation.allocate(out, segments, act.to(device), rule, temperature, *more)
        assert bool(wide[:, n:].isnan().all()), "written beside the gates"
        found, expected = out, oracle * out_factor
        assert torch.equal(found.isnan().cpu(), expected.isnan()), "NaN elsewhere"
        return error(found.nan_to_num(), expected.nan_to_num())

    return run


def allocation_checks(small: bool) -> Iterator[Check]:
    """Every rule and corner; ``small``: sizes for the interpreter."""
    counts = [3, 1, 9, 70, 2] if small else [3, 1, 9, 700, 64, 65, 2]
    n = 21 if small else 333
    for rule in allocation.RULES:
        yield Check("allocate", rule, _check_allocate(rule, counts, n))
        yield Check("allocate", f"{rule}, few", _check_allocate(rule, [3, 0, 1, 5], n))
        yield Check("allocate", f"{rule}, corners", _check_allocate(rule, counts, n, away=[3, 5, 6], zeros=True))
        yield Check("allocate", f"{rule}, NaN", _check_allocate(rule, counts, n, nan=True))
        corners = {"away": [0, 5, 6], "zeros": True, "bias": 0, "rest": 0}
        yield Check("allocate", f"{rule}, bias and rest", _check_allocate(rule, counts, n, **corners))
        yield Check("allocate", f"{rule}, scales", _check_allocate(rule, counts, n, scaled=True, **corners))
    yield Check("allocate", "max, equals", _check_allocate("max", [40], 5, equal=True))  # in two tiles
    yield Check("allocate", "one component", _check_allocate("softmax", [1], 1))
    yield Check("allocate", "cold", _check_allocate("softmax", [9, 70], n, temperature=0.01))
    for temperature in (1e-31, 1e-38, 1e31):  # the first were equal to a sentinel, their inverse overflows
        frozen = _check_allocate("softmax", counts, n, away=[3, 5, 6], zeros=True, temperature=temperature)
        yield Check("allocate", f"T = {temperature:g}", frozen)
    yield Check("allocate", "loud", _check_allocate("softmax", [9, 70], n, scale=10.0))  # exponents up to 200
