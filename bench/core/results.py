"""Result files: measured facts, where they were measured, and how they are written."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import transformers

ROOT = Path(__file__).parent.parent.parent  # of the checkout


class Fact(Protocol):
    """One row of a result file."""

    def as_dict(self) -> dict: ...


@dataclass
class Row:
    """One measured fact. Times in seconds, memory in bytes; ``max_error`` is relative to the largest score."""

    workload: str
    model: str
    provider: str
    dtype: str
    median_s: float
    p20_s: float
    p80_s: float
    runs: int
    gflops: float | None  # useful: the floor over the median
    gemm_fraction: float | None  # of `gemm_gflops`
    gemm_gflops: float | None  # the machine's rate, measured in the same run
    peak_bytes: int | None
    max_error: float | None
    compared_with: str
    verified: bool
    first_call: bool = False  # too slow to be called again: the time includes compilation and first allocations
    first_call_s: float | None = None  # where it is timed apart
    environment: dict = field(default_factory=dict)

    def as_dict(self) -> dict:
        tflops = None if self.gflops is None else self.gflops / 1e3
        return {**asdict(self), "tflops": tflops, "device": self.environment.get("device")}


def environment(device: str = "cpu") -> dict:
    """The place of a measurement: device, versions, commit, threads."""
    return {
        "device": _cpu_name() if device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _triton_version(),
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def write_results(path: Path, benchmark: str, rows: Sequence[Fact], device: str | None = None, **more: object) -> None:
    """Write a result file, which :mod:`bench.report` reads: the place of the measurement, the rows, and ``more``.

    ``device``: by default the GPU where there is one, except for the benchmark `cpu`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if device is None:
        device = "cpu" if benchmark == "cpu" or not torch.cuda.is_available() else "cuda"
    place = environment(torch.device(device).type)
    content = {"benchmark": benchmark, "environment": place, **more, "rows": [row.as_dict() for row in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def _triton_version() -> str | None:
    try:
        return version("triton")
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str:
    """The measured commit, with "+" where the working tree differs from it."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
