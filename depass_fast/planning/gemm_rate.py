"""The rate at which this machine multiplies matrices, on which estimates of time rest."""

from __future__ import annotations

import functools
import time

import torch

_SHAPES = {"cpu": (1024, 1024, 2816), "cuda": (8192, 4096, 11008)}  # rows, in, out


@functools.cache
def gemm_rate(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Return the FLOP per second of a large product, the best of four, and words that say so.

    It takes a fraction of a second.
    """
    rows, inner, outer = _SHAPES.get(device.type, _SHAPES["cpu"])
    a, b = (torch.full(shape, 0.5, device=device, dtype=dtype) for shape in ((rows, inner), (inner, outer)))
    out, best = a.new_empty(rows, outer), float("inf")
    for _ in range(4):
        began = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    words = f"measured just now on {device}{threads}: {rows} x {inner} x {outer} in {str(dtype).removeprefix('torch.')}"
    return 2 * rows * inner * outer / best, words
