"""The fused products against plain float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from . import fused_products
from .allocation_checks import allocation_oracle, chunk
from .checking import Check, error, poisoned, random


def _check_products(
    counts: list[int], width: int, n: int, away: Sequence[int] = (), bias: int | None = None, rest: int | None = None
) -> Callable:
    def run(dtype: torch.dtype, device: torch.device) -> float:
        x = (random(0, sum(counts), width) * width**-0.5).to(dtype)
        x[::4] = 0
        w_gate, w_down = (random(1, n, width) * 0.3).to(dtype), (random(2, width, n) * n**-0.5).to(dtype)
        act, state = random(3, len(counts), n).to(dtype), random(4, len(x), width)
        constant = random(5, n) if bias is not None else None
        alive = (x != 0).any(1).to(torch.uint8)
        starts, begins, _ = chunk(counts, device)
        gone = alive == 0
        gone[list(away)] = True
        if bias is not None:  # its constant is not zero, so that it takes part whatever its row is
            gone[[int(begin) + bias for begin in starts[:-1]]] = False
        flags = gone.to(torch.uint8).to(device)
        tiles, firsts = fused_products.row_tiles(starts, fused_products.product_config(dtype, device)["BM"])
        tiles, firsts = torch.from_numpy(tiles).to(device), torch.from_numpy(firsts).to(device)
        recorded = torch.arange(len(counts))
        g = poisoned(len(x), n, dtype=dtype, device=device)
        numbers = None if constant is None else constant.to(device)
        log_z = fused_products.gate(
            x.to(device), w_gate.to(device), tiles, firsts, begins, 0.1, g, numbers, bias, flags
        )  # fmt: skip
        worst = error(g, x.double() @ w_gate.double().T)
        exact = g.cpu()
        worst = max(worst, _log_z_error(log_z, exact, counts, gone, constant, bias, 0.1))
        shares = allocation_oracle(
            "softmax", exact, counts, act, recorded, alive, list(away), constant, bias, rest, 0.1
        )  # fmt: skip
        fallback = torch.zeros(len(x))
        for begin, end in pairwise(starts):
            here = alive[begin:end].float()
            fallback[begin:end] = here / here.sum().clamp_min(1)
            if rest is not None and end > begin:
                fallback[begin:end] = 0
                fallback[begin + rest] = 1
        out = state.clone().to(device)
        fused_products.down(
            out, g, w_down.to(device), act.to(device), recorded.to(device), log_z, tiles, begins, 0.1,
            fallback.to(device), numbers, bias, flags,
        )  # fmt: skip
        return max(worst, error(out, state.double() + shares @ w_down.double().T))

    return run


def _log_z_error(
    log_z: Tensor,
    g: Tensor,
    counts: list[int],
    gone: Tensor,
    constant: Tensor | None,
    bias: int | None,
    t: float,
) -> float:
    oracle, start = [], 0
    for count in counts:
        z = g[start : start + count].double().clone()
        if constant is not None and count:
            z[bias] += constant.double()
        z = (z / t).masked_fill(gone[start : start + count, None], -torch.inf)
        oracle.append(torch.logsumexp(z, 0) * 1.4426950408889634 if count else z.new_full(z.shape[1:], -torch.inf))
        start += count
    oracle, log_z = torch.stack(oracle), log_z.double().cpu()
    if not bool(((oracle == -torch.inf) == (log_z == -torch.inf)).all()):
        return float("inf")
    there = oracle != -torch.inf
    return float(((log_z - oracle)[there].abs() / oracle[there].abs().clamp_min(1)).amax()) if there.any() else 0.0


def product_checks(small: bool) -> Iterator[Check]:
    """The products with and without corners; ``small``: sizes for the interpreter."""
    sizes = ([3, 1, 70], 24, 40) if small else ([30, 1, 300, 128], 200, 333)
    yield Check("products", "plain", _check_products(*sizes))
    yield Check("products", "bias, rest, away", _check_products(*sizes, away=[0, 3, 5], bias=0, rest=0))
    yield Check("products", "alone", _check_products([1], *sizes[1:]))
