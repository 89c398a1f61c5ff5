"""Small arrays between host and device, with a GPU waited for as seldom as can be."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_ASIDE = 64 << 10  # bytes of pageable memory that CUDA copies aside before it returns; for more it waits
_ALIGNED = 16  # bytes: what kernels are compiled to rely on, where an address is a multiple of that

_DTYPES = {"uint8": torch.uint8, "int32": torch.int32, "int64": torch.int64}


def to_device(values: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """A small array of the host on a device; a GPU is not waited for, whatever it has to do before it is there."""
    if isinstance(values, np.ndarray):
        values = torch.from_numpy(np.ascontiguousarray(values))
    if device.type != "cuda":  # others (MPS) may read what has gone by then
        return values.to(device)
    if values.device.type == "cpu" and values.nbytes > _ASIDE:
        values = values.pin_memory()  # which PyTorch keeps until it has been read
    return values.to(device, non_blocking=True)


def all_to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[Tensor]:
    """As :func:`to_device`, all of them by one copy: of uint8, int32 or int64."""
    if device.type == "cpu":  # where there is nothing to copy
        return [to_device(array, device) for array in arrays]
    packed, begins = packed_together(arrays)
    return taken_apart(to_device(packed, device), arrays, begins)


def packed_together(arrays: Sequence[np.ndarray]) -> tuple[np.ndarray, list[int]]:
    """The bytes of all arrays in one (n,) uint8, and where each begins."""
    sizes = [-(-array.nbytes // _ALIGNED) * _ALIGNED for array in arrays]
    begins = [0, *np.cumsum(sizes).tolist()]
    packed = np.zeros(begins.pop(), np.uint8)
    for begin, array in zip(begins, arrays, strict=True):
        packed[begin : begin + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    return packed, begins


def taken_apart(packed: Tensor, arrays: Sequence[np.ndarray], begins: Sequence[int]) -> list[Tensor]:
    """Views of what :func:`packed_together` made of ``arrays``, each with its dtype and shape."""
    parts = (packed[begin : begin + array.nbytes] for begin, array in zip(begins, arrays, strict=True))
    return [part.view(_DTYPES[array.dtype.name]).view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in host memory, by one copy per device and dtype: each copy waits for all that a GPU has to do."""
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(tensors):
        alike.setdefault((tensor.device, tensor.dtype), []).append(i)
    found: dict[int, Tensor] = {}
    for members in alike.values():
        flat = torch.cat([tensors[i].flatten() for i in members]).cpu()
        for i, part in zip(members, flat.split([tensors[i].numel() for i in members]), strict=True):
            found[i] = part.view(tensors[i].shape)
    return [found[i] for i in range(len(tensors))]
