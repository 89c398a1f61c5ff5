"""Which implementation carries the component state: chosen explicitly, or automatically and said once.

What is asked for by name and cannot run raises with the reason and the alternatives; only ``"auto"`` falls back.
"""

from __future__ import annotations

import torch

from .base import Backend
from .reference import ReferenceBackend
from .stream import StreamBackend
from .torch import TorchBackend

__all__ = [
    "BACKENDS",
    "Backend",
    "ReferenceBackend",
    "StreamBackend",
    "TorchBackend",
    "backend_status",
    "make_backend",
    "resolve",
]

BACKENDS = ("reference", "torch")


def backend_status() -> dict[str, str | None]:
    """Every backend, with the reason why it cannot run here, or None where it can."""
    return {name: None for name in BACKENDS}


def resolve(name: str) -> str:
    """The backend that ``name`` stands for on this machine.

    Raises:
        ValueError: no such backend; the message lists those that can run here.
    """
    if name == "auto":
        return "torch"
    status = backend_status()
    if name not in status:
        usable = ", ".join(repr(n) for n in ("auto", *status))
        raise ValueError(f"backend: unknown backend {name!r}. Available here: {usable}.")
    return name


def make_backend(name: str, compute_dtype: torch.dtype | None = None, memory_budget: int | None = None) -> Backend:
    """A backend by name (see :func:`resolve`); the oracle takes neither option, it is all in the state's dtype."""
    if resolve(name) == "reference":
        return ReferenceBackend()
    return TorchBackend(compute_dtype, memory_budget)
