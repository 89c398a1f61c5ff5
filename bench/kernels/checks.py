"""Every kernel against plain float64, on random inputs with odd sizes.

The tests run these checks in the interpreter, and ``bench.speed.gpu`` runs them on a GPU before it times anything. A
check makes its inputs, poisons the outputs with NaN, runs a kernel and returns the largest error relative to the
largest element of the oracle.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import torch

from .allocation_checks import allocation_checks
from .attention_checks import attention_checks
from .checking import LIMITS, Check
from .completeness_checks import completeness_checks
from .crowd_checks import crowd_checks
from .few_checks import few_checks
from .linear_checks import linear_checks
from .loudness_checks import loudness_checks
from .product_checks import product_checks
from .row_checks import row_checks


def checks(small: bool) -> Iterator[Check]:
    """Every kernel and corner; ``small``: sizes for the interpreter."""
    yield from row_checks(small)
    yield from attention_checks(small)
    yield from allocation_checks(small)
    yield from linear_checks(small)
    yield from crowd_checks(small)
    yield from completeness_checks(small)
    yield from few_checks(small)
    yield from loudness_checks(small)
    yield from product_checks(small)


def _errors(place: int, small: bool, device: str) -> list[float]:
    torch.set_num_threads(1)  # for the oracle; other processes compile meanwhile
    check = list(checks(small))[place]
    return [check.run(dtype, torch.device(device)) for dtype in LIMITS]


def verify(device: torch.device, small: bool = False, workers: int = 12) -> dict[tuple[str, torch.dtype], float]:
    """Return the worst error of every kernel in every dtype. On a GPU, ``workers`` processes compile.

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
