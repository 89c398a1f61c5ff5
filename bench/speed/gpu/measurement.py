"""Timing of workloads and the peaks of their memory."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ...core.results import Row
from ...core.timing import interleaved, quantiles
from .session import Session
from .timeline import described, profiled
from .workloads import Work, fastest, provider


def providers_of(work: Work, chosen: list[str]) -> list[str]:
    """The providers of a workload that are ``chosen``."""
    return [name for name in work.providers or (fastest(),) if name in chosen]


def measure(session: Session, work: Work, names: list[str]) -> None:
    """Add a row per provider of ``names``, timed in turns: the runs of the workload, or as many as there is time for.

    A provider whose first call takes more than twice the session's seconds is not called again: that call is the row,
    and the row says so.
    """
    model = session.model(work.shape)
    rate = session.rates(work.shape).best
    calls, peaks, first = {}, {}, {}
    for name in names:
        call = provider(name, work, model)
        try:
            peaks[name], first[name] = _peak(call, session.device)
        except (torch.OutOfMemoryError, MemoryError):
            session.say(f"{work.name}: {name} does not fit")
        if name not in first:  # not in the handler, where the error still holds the tensors of its frames
            torch.cuda.empty_cache()
            continue
        calls[name] = call
    again = {name: call for name, call in calls.items() if work.runs > 1 and first[name] <= 2 * session.seconds}
    timed = {name: np.array([value]) for name, value in first.items()}
    if again:
        once = interleaved(again, 1, warmup=0)  # a first call compiles: it tells nothing of the others
        left = session.seconds - sum(float(values[0]) for values in once.values())
        more = int(min(work.runs - 1, max(1, left / sum(float(values[0]) for values in once.values()))))
        rest = interleaved(again, more, warmup=0)
        timed |= {name: np.concatenate([once[name], rest[name]]) for name in again}
    for name, values in timed.items():
        timing = quantiles(values)
        gflops, key = work.flops / timing["median_s"] / 1e9, (name, work.kind, session.dtype)
        row = Row(
            workload=work.name,
            model=work.shape.name,
            provider=name + (f" in {work.groups} groups" if name == "published" and work.groups > 1 else ""),
            dtype=str(session.dtype).removeprefix("torch."),
            **timing,
            gflops=gflops,
            gemm_fraction=gflops * 1e9 / rate,
            gemm_gflops=rate / 1e9,
            peak_bytes=peaks[name],
            max_error=session.errors.get(key),
            compared_with=f"{'itself' if name == 'published' else 'reference backend'}, float64, on a small model",
            verified=key in session.errors,
            first_call=name not in again,
            first_call_s=first[name],
            environment=session.place,
        )
        session.rows.append(row)
        session.say(line(row))
    session.write()
    if work.profile and names:
        found = profiled(calls[names[0]], session.device)
        session.sections.setdefault("timelines", {})[f"{work.shape.name} {work.name}"] = found
        session.say(f"{work.name}\n{described(found)}")


def line(row: Row) -> str:
    """One row as it is printed."""
    peak = "" if row.peak_bytes is None else f"  peak {row.peak_bytes / 2**30:6.2f} GiB"
    assert row.gflops is not None and row.gemm_fraction is not None and row.first_call_s is not None
    return (
        f"{row.model:13} {row.workload:40} {row.provider:14} {row.median_s:9.4f} s "
        f"[{row.p20_s:.4f}, {row.p80_s:.4f}] x{row.runs}, first {row.first_call_s:.3f}  "
        f"{row.gflops / 1e3:7.2f} TFLOP/s  {row.gemm_fraction:4.0%} of GEMM{peak}"
    )


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
