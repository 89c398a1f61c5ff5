"""Timing: candidates in turns, quantiles, and the GEMM rate of the machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypedDict

import numpy as np
import torch

from depass_fast.runtime.products import write_product

from .models import Shape


def interleaved(candidates: Mapping[str, Callable[[], object]], runs: int, warmup: int = 1) -> dict[str, np.ndarray]:
    """Seconds of every candidate, ``runs`` each. They take turns: what disturbs the machine disturbs all of them."""
    for _ in range(warmup):
        for candidate in candidates.values():
            candidate()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(runs):
        names = list(candidates)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(_timed(candidates[name]))
    return {name: np.array(values) for name, values in seconds.items()}


def _timed(candidate: Callable[[], object]) -> float:
    synchronise()
    began = time.perf_counter()
    candidate()
    synchronise()
    return time.perf_counter() - began


def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Timing(TypedDict):
    """The times of one candidate, as a row names them."""

    median_s: float
    p20_s: float
    p80_s: float
    runs: int


def quantiles(seconds: np.ndarray) -> Timing:
    """Median, p20 and p80 of measured seconds, and their number."""
    low, middle, high = np.quantile(seconds, [0.2, 0.5, 0.8])
    return {"median_s": float(middle), "p20_s": float(low), "p80_s": float(high), "runs": len(seconds)}


class Gemm:
    """The two MLP products alone, (rows, D) x (D, I) and (rows, I) x (I, D): the rate that the machine can reach.

    Outputs are preallocated, and weights have a model's memory layout. On a CPU they are by the
    faster of torch's libraries, as the engine's. The constructor tries several sizes up to the workload's ``rows`` and
    keeps the fastest.
    """

    SIZES = (512, 1024, 2048, 4096, 8192)

    def __init__(self, shape: Shape, rows: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        make = torch.Generator().manual_seed(0)

        def matrix(n: int, m: int) -> torch.Tensor:
            return torch.randn(n, m, generator=make).to(device, dtype)

        self.shape = shape
        self.w_gate, self.w_down = matrix(shape.intermediate, shape.hidden), matrix(shape.hidden, shape.intermediate)
        sizes = [size for size in self.SIZES if size <= rows] or [rows]
        self.x, self.g = matrix(max(sizes), shape.hidden), matrix(max(sizes), shape.intermediate)
        self.rows = max(sizes)
        self.repeats = 1
        rates = {}
        for size in sizes:
            self._resize(size)
            rates[size] = self.rate(interleaved({"gemm": self}, runs=5)["gemm"])
        self._resize(max(rates, key=rates.__getitem__))

    def _resize(self, rows: int) -> None:
        self.rows, self.repeats = rows, max(1, self.SIZES[-1] // rows)
        self.up = self.x.new_empty(rows, self.shape.intermediate)
        self.down = self.x.new_empty(rows, self.shape.hidden)

    def __call__(self) -> None:
        for _ in range(self.repeats):
            write_product(self.up, self.x[: self.rows], self.w_gate.T)
            write_product(self.down, self.g[: self.rows], self.w_down.T)

    def rate(self, seconds: np.ndarray) -> float:
        """GFLOP/s at the median."""
        flops = self.repeats * self.rows * 4 * self.shape.hidden * self.shape.intermediate
        return flops / float(np.median(seconds)) / 1e9
