"""Timing, peaks of memory, and profiles of a GPU's workloads."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage] (torch documents no other place)
from torch.profiler import ProfilerActivity, profile

from ...core.models import Model
from ...core.results import Row
from ...core.timing import interleaved, quantiles, synchronise
from .verification import Errors
from .workloads import Work, backends, provider


def machine(device: torch.device, dtype: torch.dtype, size: int) -> tuple[float, float]:
    """The machine's rates: of a square GEMM in FLOP/s, and of copies in bytes/s."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    bulk = torch.empty(size * size * 16, dtype=torch.uint8, device=device)
    other = torch.empty_like(bulk)
    seconds = interleaved({"gemm": lambda: torch.mm(a, b, out=out), "copy": lambda: other.copy_(bulk)}, 20, warmup=5)
    best = {name: quantiles(values)["median_s"] for name, values in seconds.items()}
    return 2 * size**3 / best["gemm"], 2 * bulk.numel() / best["copy"]


def providers_of(work: Work, chosen: list[str]) -> list[str]:
    """The providers of a workload that are ``chosen``."""
    return [name for name in work.providers or backends() if name in chosen]


@dataclass(frozen=True)
class Session:
    """The facts of a run that all its rows share: errors, the machine's GEMM rate in FLOP/s, and where it is."""

    device: torch.device
    errors: Errors
    rate: float
    place: dict


def measure(session: Session, work: Work, model: Model, names: list[str], seconds: float) -> list[Row]:
    """A row per provider of ``names``, timed in turns for about ``seconds``.

    A provider whose first call takes more than twice that is not called again: that call is the row, and the row says
    so.
    """
    calls, peaks, first = {}, {}, {}
    for name in names:
        call = provider(name, work, model)
        try:
            peaks[name], first[name] = _peak(call, session.device)
        except (torch.OutOfMemoryError, MemoryError):
            print(f"  {work.name}: {name} does not fit", flush=True)
        if name not in first:  # not in the handler, where the error still holds the tensors of its frames
            torch.cuda.empty_cache()
            continue
        calls[name] = call
    again = {name: call for name, call in calls.items() if first[name] <= 2 * seconds}
    runs = int(min(9, max(1, seconds / max(sum(first[name] for name in again), 1e-9))))
    timed = {name: np.array([value]) for name, value in first.items()} | (
        interleaved(again, runs, warmup=0) if again else {}
    )
    rows = []
    for name, values in timed.items():
        timing = quantiles(values)
        gflops = work.flops / timing["median_s"] / 1e9
        dtype = model.dtype
        rows.append(
            Row(
                workload=work.name,
                model=work.shape.name,
                provider=name + (f" in {work.groups} groups" if name == "published" and work.groups > 1 else ""),
                dtype=str(dtype).removeprefix("torch."),
                **timing,
                gflops=gflops,
                gemm_fraction=gflops * 1e9 / session.rate,
                gemm_gflops=session.rate / 1e9,
                peak_bytes=peaks[name],
                max_error=session.errors.get((name, work.components, dtype)),
                compared_with=f"{'itself' if name == 'published' else 'reference backend'}, float64, on a small model",
                verified=(name, work.components, dtype) in session.errors,
                first_call=name not in again,
                environment=session.place,
            )
        )
    return rows


def _peak(call: Callable[[], Tensor], device: torch.device) -> tuple[int | None, float]:
    """The most bytes that a first call held beyond the model, and its seconds."""
    cuda, before = device.type == "cuda", 0
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    began = time.perf_counter()
    if not bool(torch.isfinite(call()).all()):
        raise RuntimeError("scores hold NaN or inf.")
    if not cuda:
        return None, time.perf_counter() - began
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before, time.perf_counter() - began


def profiled(call: Callable[[], Tensor], top: int = 14) -> str:
    """The kernels that take most of the device's time in one call, and their share of the call."""
    began = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        call()
        synchronise()
    seconds = time.perf_counter() - began
    events = [e for e in recorded.key_averages() if e.self_device_time_total and e.device_type != DeviceType.CPU]
    events.sort(key=lambda e: -e.self_device_time_total)
    busy = sum(e.self_device_time_total for e in events) / 1e6
    lines = [f"   {seconds:.3f} s with the profiler, the device busy for {busy:.3f} s"]
    for e in events[:top]:
        lines.append(f"   {e.self_device_time_total / 1e3:9.2f} ms {e.count:6} x  {e.key[:90]}")
    return "\n".join(lines)
