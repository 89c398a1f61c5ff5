"""How much memory a device has left, and what running out of it looks like."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

_GROUPS = (  # what a container may use and does use, and how much of that the system gives back by itself
    (
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/memory.current",
        "/sys/fs/cgroup/memory.stat",
        ("inactive_file", "active_file"),
    ),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
        ("total_inactive_file", "total_active_file"),
    ),
)


def available(device: torch.device) -> int | None:
    """Bytes that can still be allocated on ``device``; None where the system does not tell."""
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return None  # another machine's
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    found = [size for size in (_system(), *(_group(*paths) for paths in _GROUPS)) if size is not None]
    return min(found, default=None)


def _system() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _group(limit: str, used: str, statistics: str, reclaimable: tuple[str, ...]) -> int | None:
    try:
        bound = Path(limit).read_text().strip()
        if not bound.isdecimal():  # "max"
            return None
        free = int(bound) - int(Path(used).read_text())
        lines = Path(statistics).read_text().splitlines()
    except (OSError, ValueError):
        return None
    return max(0, free + sum(int(line.split()[1]) for line in lines if line.split()[0] in reclaimable))


def host_room(shape: Sequence[int], dtype: torch.dtype, pinned: bool) -> Tensor:
    """Room for a tensor in host memory; ``pinned``, where there is room for that, so that a GPU copies it by itself.

    PyTorch gives pinned memory in powers of two: just above one, a state would take twice what it is.
    """
    free, nbytes = available(torch.device("cpu")), prod(shape) * dtype.itemsize
    taken = 1 << max(0, nbytes - 1).bit_length()
    return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=pinned and (free is None or taken <= free))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory has run out: a class of PyTorch's on a GPU, a sentence from all others."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = str(error)
    phrases = ("not enough memory", "can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(phrase in said for phrase in phrases)


def readable(size: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB" if size < 1024 else f"{size / 1024:.1f} TiB"
