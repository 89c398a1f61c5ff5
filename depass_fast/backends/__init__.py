"""The implementations that carry the component state, and their choice by name or automatically."""

from __future__ import annotations

from .base import Backend
from .reference import ReferenceBackend
from .selection import (
    BACKENDS,
    VARIABLE,
    Choice,
    backend_status,
    choose_backend,
    has_compute_dtype,
    make_backend,
    resolve,
)
from .shard import ShardBackend
from .stream import StreamBackend
from .torch.backend import TorchBackend

__all__ = [
    "BACKENDS",
    "VARIABLE",
    "Backend",
    "Choice",
    "ReferenceBackend",
    "ShardBackend",
    "StreamBackend",
    "TorchBackend",
    "backend_status",
    "choose_backend",
    "has_compute_dtype",
    "make_backend",
    "resolve",
]
