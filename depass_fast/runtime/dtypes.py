"""Floating dtypes: parsing, names, and the widest of several."""

from __future__ import annotations

import functools

import torch


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without "torch."."""
    return str(dtype).removeprefix("torch.")


def widest(*dtypes: torch.dtype) -> torch.dtype:
    """Return the dtype that all of these can be converted to without loss."""
    return functools.reduce(torch.promote_types, dtypes)


def refuse_autocast(device: torch.device) -> None:
    """Raise ValueError inside `torch.autocast`, which would round terms of sums that must be exact."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        raise ValueError("torch.autocast is on: leave its context; compute_dtype chooses the precision here.")


def parse_dtype(value: torch.dtype | str | None, argument: str) -> torch.dtype | None:
    """Return a floating dtype, given as such, by its name ("bfloat16") or as None. ``argument`` is named in errors."""
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if dtype is None and value is None:
        return None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"{argument}: {value!r} is no floating dtype; try 'float32', 'bfloat16' or 'float64'.")
    return dtype
