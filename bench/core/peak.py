"""Peaks of memory: the high-water mark of a call, measured in a process of its own.

On a CPU the peak is read from ``VmHWM``, which the kernel keeps exactly and which is reset before the call: sampling
could miss a peak, and ``ru_maxrss`` inherits the resident set of the process that forked this one. Linux only. On a GPU
it is the most that the allocator held.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from .results import ROOT

_RESET = Path("/proc/self/clear_refs")


def measurable() -> bool:
    """True if the system can tell a process its peak."""
    return _RESET.exists()


def fresh_process(module: str, *arguments: object) -> int | None:
    """The number that ``python -m module arguments`` prints last, or None where peaks are not measurable."""
    if not measurable():
        return None
    command = [sys.executable, "-m", module, *map(str, arguments)]
    return int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()[-1])


def _status(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found, key
    return 1024 * int(found[1])


def measured(call: Callable[[], object], device: str = "cpu") -> int:
    """The high-water mark of the resident set (or of the GPU's memory) during ``call``, less that just before it."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    _RESET.write_text("5")
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before
