"""Floating dtypes: parsed, named, and widened."""

from __future__ import annotations

import functools

import torch


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def widest(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype that holds all of these: of a state, of products, of what a model recorded."""
    return functools.reduce(torch.promote_types, dtypes)


def refuse_autocast(device: torch.device) -> None:
    """ValueError inside `torch.autocast`: it would round what a result has to add up to."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        raise ValueError("torch.autocast is on: leave its context; compute_dtype chooses the precision here.")


def parse_dtype(value: torch.dtype | str | None, argument: str) -> torch.dtype | None:
    """A floating dtype by itself or by name ("bfloat16"), or None."""
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if dtype is None and value is None:
        return None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize < 2:
        raise ValueError(f"{argument}: {value!r} is no floating dtype; try 'float32', 'bfloat16' or 'float64'.")
    return dtype
