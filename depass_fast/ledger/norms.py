"""A branch's norm with its scale frozen, as the way back needs it: there and back, with one scale for both."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..adapters import Norm
from ..backends.selection import why_not_triton


@dataclass(frozen=True)
class FrozenNorm:
    """γ ⊙ (x - mean x) · s at A positions: ``weight`` is s · γ (A, D), or (A, 1) without γ; None for no norm.

    The mean is left where it is unless ``centred``. β is no part of it.
    """

    weight: Tensor | None
    centred: bool

    @staticmethod
    def of(norm: Norm | None, resid: Tensor, dtype: torch.dtype) -> FrozenNorm:
        """Freeze the ``norm`` of hidden states ``resid`` (A, D); everything is in ``dtype``."""
        if norm is None:
            return FrozenNorm(None, False)
        scale = _scale(norm, resid, dtype).view(len(resid), -1)  # a gate's is by channel
        return FrozenNorm(scale if norm.weight is None else scale * norm.weight, norm.centred)  # in the wider dtype

    def read(self, x: Tensor) -> Tensor:
        """Apply it to hidden states (A, D)."""
        if self.weight is None:
            return x
        return (x - x.mean(-1, keepdim=True) if self.centred else x) * self.weight

    def back(self, y: Tensor) -> Tensor:
        """Apply its transpose to gradients (R, A, D)."""
        if self.weight is None:
            return y
        y = y * self.weight
        return y - y.mean(-1, keepdim=True) if self.centred else y


def _scale(norm: Norm, resid: Tensor, dtype: torch.dtype) -> Tensor:
    """Return s of hidden states (A, D) -> (A,), on a GPU by one kernel."""
    if norm.is_factor or norm.gate is not None or not has_kernels(resid.device, dtype, resid.dtype):
        return norm.scale(resid.to(dtype)).to(dtype)
    from ..kernels.rows import row_scales  # needs Triton

    with on_device(resid.device):
        return row_scales(resid.contiguous(), None, norm.eps, norm.centred)


def has_kernels(device: torch.device, *dtypes: torch.dtype) -> bool:
    """True if Triton's kernels can do what is held in these ``dtypes``, on a device; its interpreter is not meant."""
    if device.type == "cpu" or torch.float64 in dtypes:
        return False
    return _runs_kernels(device) if device.type == "cuda" else why_not_triton(device, torch.float32) is None


@lru_cache(maxsize=64)
def _runs_kernels(device: torch.device) -> bool:
    return why_not_triton(device, torch.float32) is None


def on_device(device: torch.device) -> AbstractContextManager:
    """Make ``device`` the current one: Triton launches there."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
