"""Copies of small arrays between host and device that wait for a GPU as seldom as possible."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_STAGED = 64 << 10  # bytes of pageable memory that CUDA copies to a buffer before it returns; for more it waits
_ALIGNMENT = 16  # bytes: kernels are compiled for addresses that are multiples of this

_DTYPES = {"uint8": torch.uint8, "int32": torch.int32, "int64": torch.int64}


def to_device(values: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """Copy a small array of the host to a device. The copy is queued on a GPU, which is not waited for."""
    if isinstance(values, np.ndarray):
        values = torch.from_numpy(np.ascontiguousarray(values))
    if device.type != "cuda":  # other devices (MPS) may read the host's memory after it was freed
        return values.to(device)
    if values.device.type == "cpu" and values.nbytes > _STAGED:
        values = values.pin_memory()  # PyTorch keeps pinned memory until it has been read
    return values.to(device, non_blocking=True)


def all_to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """Copy several arrays of uint8, int32 or int64 to a device in one copy, see :func:`to_device`."""
    if device.type == "cpu":  # there is nothing to copy
        return [to_device(array, device) for array in arrays]
    packed, begins = pack(arrays)
    return unpack(to_device(packed, device), arrays, begins)


def pack(arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, list[int]]:
    """Return the bytes of all arrays in one array (n,) of uint8, and the index at which each begins."""
    sizes = [-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays]
    begins = [0, *np.cumsum(sizes).tolist()]
    packed = np.zeros(begins.pop(), np.uint8)
    for begin, array in zip(begins, arrays, strict=True):
        packed[begin : begin + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    return packed, begins


def unpack(packed: Tensor, arrays: Sequence[np.ndarray], begins: Sequence[int]) -> list[Tensor]:
    """Return views of the result of ``pack(arrays)``, one for each array, with its dtype and shape."""
    parts = (packed[begin : begin + array.nbytes] for begin, array in zip(begins, arrays, strict=True))
    return [part.view(_DTYPES[array.dtype.name]).view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors to host memory in one copy per device and dtype: each copy waits for all that a GPU has to do."""
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(tensors):
        alike.setdefault((tensor.device, tensor.dtype), []).append(i)
    found: dict[int, Tensor] = {}
    for members in alike.values():
        flat = torch.cat([tensors[i].flatten() for i in members]).cpu()
        for i, part in zip(members, flat.split([tensors[i].numel() for i in members]), strict=True):
            found[i] = part.view(tensors[i].shape)
    return [found[i] for i in range(len(tensors))]
