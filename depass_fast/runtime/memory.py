"""Memory: the bytes that a device has left, host memory that a GPU can copy, and the errors of running out."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

# The files of a container's control group, versions 2 and 1: the limit, the use, and the statistics of the use with the
# names of its reclaimable parts.
_CONTROL_GROUPS = (
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
    """Return the bytes that can still be allocated on ``device``; None if the system does not tell."""
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return None  # a plan for another machine
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    sizes = [_free_in_system(), *(_free_in_group(*paths) for paths in _CONTROL_GROUPS)]
    return min((size for size in sizes if size is not None), default=None)


def _free_in_system() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _free_in_group(limit: str, used: str, statistics: str, reclaimable: tuple[str, ...]) -> int | None:
    try:
        bound = Path(limit).read_text().strip()
        if not bound.isdecimal():  # "max"
            return None
        free = int(bound) - int(Path(used).read_text())
        lines = Path(statistics).read_text().splitlines()
    except (OSError, ValueError):
        return None
    return max(0, free + sum(int(line.split()[1]) for line in lines if line.split()[0] in reclaimable))


def empty_on_host(shape: Sequence[int], dtype: torch.dtype, pinned: bool) -> Tensor:
    """Return an empty tensor in host memory. ``pinned`` memory, which a GPU copies by itself, is used if it fits.

    PyTorch rounds pinned memory up to a power of two: a tensor just above one takes twice its size.
    """
    free, nbytes = available(torch.device("cpu")), prod(shape) * dtype.itemsize
    taken = 1 << max(0, nbytes - 1).bit_length()
    return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=pinned and (free is None or taken <= free))


def is_out_of_memory(error: BaseException) -> bool:
    """True if ``error`` says that memory has run out: by its class on a GPU, by its message everywhere else."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = str(error)
    phrases = ("not enough memory", "can't allocate memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(phrase in said for phrase in phrases)


def readable(size: float) -> str:
    """Return a number of bytes with a unit, such as "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB" if size < 1024 else f"{size / 1024:.1f} TiB"
