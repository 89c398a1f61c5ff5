"""Which implementation carries the component state: chosen by name, or automatically (:mod:`.selection`)."""

from __future__ import annotations

from .base import Backend
from .reference import ReferenceBackend
from .selection import BACKENDS, VARIABLE, Choice, backend_status, choose_backend, make_backend, resolve
from .stream import StreamBackend
from .torch.backend import TorchBackend

__all__ = [
    "BACKENDS",
    "VARIABLE",
    "Backend",
    "Choice",
    "ReferenceBackend",
    "StreamBackend",
    "TorchBackend",
    "backend_status",
    "choose_backend",
    "make_backend",
    "resolve",
]
