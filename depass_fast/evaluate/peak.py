"""Peaks of memory: the high-water mark of a call.

On a CPU the peak is read from ``VmHWM``, which the kernel keeps exactly and which is reset before the call: sampling
could miss a peak, and PyTorch does not tell its allocations on a CPU. Linux only. On a GPU it is the most that the
allocator held.
"""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

import torch

_RESET = Path("/proc/self/clear_refs")


def measurable(device: torch.device | str = "cpu") -> bool:
    """True if the system can tell this process its peak on ``device``."""
    kind = torch.device(device).type
    return kind == "cuda" or (kind == "cpu" and _RESET.exists())


def measured(call: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Return the high-water mark of the resident set (or of the GPU's memory) during ``call``, less that before it.

    Memory that the process freed before, and holds for later, is not seen where ``call`` takes it: in a process that
    has done other work, :func:`give_back` comes first.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    _RESET.write_text("5")
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def give_back() -> None:
    """Give freed host memory back to the system, where the C library can (glibc)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found, key
    return 1024 * int(found[1])
