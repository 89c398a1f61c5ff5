"""Times of single calls on a device, by its own clock."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch


def seconds_of(call: Callable[[], object], device: torch.device, runs: int, warmup: int = 3) -> np.ndarray:
    """Seconds of ``runs`` calls, each between two events of the device; by the host's clock on a CPU."""
    if device.type != "cuda":
        call()
        return np.array([_on_host(call) for _ in range(runs)])
    for _ in range(warmup):
        call()
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    torch.cuda.synchronize(device)
    for begin, end in marks:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize(device)
    return np.array([begin.elapsed_time(end) / 1e3 for begin, end in marks])


def _on_host(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
