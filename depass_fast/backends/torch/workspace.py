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

    def take(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor of ``shape`` on the device (and of the dtype) of ``like``.

        What ``name`` held before is gone.
        """
        key, size = (name, like.device, dtype or like.dtype), prod(shape)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            self._buffers.pop(key, None)  # before its successor is made
            buffer = None
            buffer = self._buffers[key] = torch.empty(size, dtype=key[2], device=key[1])
        return buffer[:size].view(shape)
