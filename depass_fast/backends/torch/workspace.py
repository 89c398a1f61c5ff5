"""Buffers that live as long as one propagation: fresh memory costs as much as the arithmetic on it."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor


class Workspace:
    """Named buffers, grown when needed, kept from layer to layer and from block to block."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def clear(self) -> None:
        """Let go of all of them."""
        self._buffers.clear()

    def take(
        self,
        name: str,
        shape: tuple[int, ...],
        like: Tensor,
        dtype: torch.dtype | None = None,
        ahead: int = 0,
    ) -> Tensor:
        """An uninitialised tensor of ``shape`` on the device (and of the dtype) of ``like``.

        What ``name`` held before is gone. A buffer that has to grow becomes twice as large, but not for that larger
        than ``ahead`` numbers: one that grows in every layer is not made anew in every layer.
        """
        key, size = (name, like.device, dtype or like.dtype), prod(shape)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            grown = size if buffer is None else max(size, min(2 * buffer.numel(), ahead))
            self._buffers.pop(key, None)  # before its successor is made
            buffer = None
            buffer = self._buffers[key] = torch.empty(grown, dtype=key[2], device=key[1])
        return buffer[:size].view(shape)


def viewed(buffer: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    """View the beginning of a buffer of bytes as a tensor."""
    return buffer[: prod(shape) * dtype.itemsize].view(dtype).view(shape)
