"""The device's busy and idle time in one profiled call, and why it was idle."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from ...core.timing import synchronise

WORK = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of a trace that occupy the device
EDGES = (5.0, 20.0, 100.0, 1000.0)  # of the classes of gaps, in µs
LATENCY = 10.0  # µs between a launch on the host and the earliest begin on an idle device


@dataclass(frozen=True)
class Span:
    """One operation on the device: its name, begin and end, and when the host called for it; all in µs."""

    name: str
    begin: float
    end: float
    called: float | None = None


def timeline(spans: Sequence[Span]) -> dict:
    """The device's busy and idle time between the first and the last span, in ms; gaps by length and by cause.

    A gap is the host's where the operation after it was called for when the device had nothing left to do: the device
    waited for the host. Else the device itself took that long from one operation to the next.
    """
    gaps, busy, end = [], 0.0, None
    for span in sorted(spans, key=lambda s: s.begin):
        if end is None or span.begin >= end:
            if end is not None and span.begin > end:
                late = span.called is not None and span.called > end - LATENCY
                gaps.append((span.begin - end, late))
            busy, end = busy + span.end - span.begin, span.end
        elif span.end > end:  # beside the one before, in another stream
            busy, end = busy + span.end - end, span.end
    total = 0.0 if end is None else end - min(s.begin for s in spans)
    by_length = []
    for low, high in zip((0.0, *EDGES), (*EDGES, float("inf")), strict=True):
        inside = [gap for gap, _ in gaps if low <= gap < high]
        by_length.append({"from_us": low, "count": len(inside), "ms": sum(inside) / 1e3})
    host = sum(gap for gap, late in gaps if late)
    return {
        "total_ms": total / 1e3,
        "busy_ms": busy / 1e3,
        "idle_ms": (total - busy) / 1e3,
        "host_bound_ms": host / 1e3,
        "host_bound_share": host / total if total else 0.0,
        "gaps": by_length,
        "operations": len(spans),
        "top": top(spans),
    }


def top(spans: Sequence[Span], count: int = 16) -> list[dict]:
    """The operations that take most of the device's time, by name."""
    times: dict[str, list[float]] = defaultdict(list)
    for span in spans:
        times[span.name].append(span.end - span.begin)
    rows = [{"name": name[:120], "count": len(each), "ms": sum(each) / 1e3} for name, each in times.items()]
    return sorted(rows, key=lambda row: -row["ms"])[:count]


def spans_of(events: Sequence[dict]) -> list[Span]:
    """The device's operations among the events of a Chrome trace."""
    called = {}
    for event in events:
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {}):
            called[event["args"]["correlation"]] = event["ts"]
    return [
        Span(e["name"], e["ts"], e["ts"] + e.get("dur", 0.0), called.get(e.get("args", {}).get("correlation")))
        for e in events
        if e.get("cat") in WORK
    ]


def profiled(call: Callable[[], object], device: torch.device) -> dict:
    """The timeline of one call, without its first use."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as recorded:
        call()
        synchronise()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return timeline(spans_of(events))


def described(found: dict) -> str:
    """A timeline in a few lines."""
    lines = [
        f"device busy {found['busy_ms']:.1f} of {found['total_ms']:.1f} ms with the profiler, idle "
        f"{found['idle_ms']:.1f} ms, of which {found['host_bound_ms']:.1f} ms waiting for the host "
        f"({found['host_bound_share']:.1%}); {found['operations']} operations",
        "gaps: " + ", ".join(f"from {g['from_us']:g} µs {g['count']} ({g['ms']:.1f} ms)" for g in found["gaps"]),
    ]
    lines += [f"{row['ms']:9.2f} ms {row['count']:6} x  {row['name'][:90]}" for row in found["top"]]
    return "\n".join("    " + line for line in lines)
