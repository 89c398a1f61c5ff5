"""The choice of a backend: by argument, by the environment, or automatically, which is logged once.

A backend that is asked for by name and cannot run raises with the reason and the alternatives; only ``"auto"`` falls
back.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import torch

from ..runtime.log import say_once
from .base import Backend
from .reference import ReferenceBackend
from .torch.backend import TorchBackend

BACKENDS = ("reference", "torch", "triton")
VARIABLE = "DEPASS_FAST_BACKEND"


@dataclass(frozen=True)
class Choice:
    """A backend that can run, and why it is this one; ``automatic`` if nobody asked for it by name."""

    name: str
    why: str
    automatic: bool


def backend_status(device: torch.device | None = None, dtype: torch.dtype | None = None) -> dict[str, str | None]:
    """Return every backend with the reason why it cannot run, or None where it can.

    ``device`` is the model's, by default a GPU where there is one; ``dtype`` that of the products, None for any.
    """
    return {"reference": None, "torch": None, "triton": why_not_triton(device or _device(), dtype)}


def why_not_triton(device: torch.device, dtype: torch.dtype | None) -> str | None:
    """Return the reason why the triton backend cannot run, or None. Triton is not imported before somebody asks."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    try:
        from .triton.machine import why_not
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    return why_not(device, dtype)


def choose_backend(name: str, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Choice:
    """Return the backend that ``name`` stands for, for a model on ``device`` and products in ``dtype``.

    ``"auto"`` is what the variable DEPASS_FAST_BACKEND names. Where it names none either: triton on a GPU where it can
    run, else torch.

    Raises:
        ValueError: there is no such backend, or it cannot run; the message says why, and names those that can.
    """
    name, asked = requested(name)
    device = device or _device()
    if name == "auto":
        return _automatic(device, dtype)
    if name in ("reference", "torch"):  # they run anywhere
        return Choice(name, f"{asked} asks for it", automatic=False)
    status = backend_status(device, dtype)
    if name in status and status[name] is None:
        return Choice(name, f"{asked} asks for it", automatic=False)
    usable = ("auto", *(other for other, reason in status.items() if reason is None))
    wrong = f"{name!r} cannot run: {status[name]}" if name in status else f"unknown backend {name!r}"
    raise ValueError(f"{asked}: {wrong}. Available on {device}: {', '.join(map(repr, usable))}.")


def resolve(name: str, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Choice:
    """Return :func:`choose_backend`'s choice; an automatic one is logged at level INFO, once per process."""
    choice = choose_backend(name, device, dtype)
    if choice.automatic:
        say_once(f"backend: {choice.name} on {device or _device()}: {choice.why}")
    return choice


def make_backend(
    name: str, compute_dtype: torch.dtype | None = None, memory_budget: int | None = None, float16: bool = False
) -> Backend:
    """Return a new backend by the name that was chosen; the reference takes none of the options.

    ``float16``: the triton backend computes in float16 where the weights allow it, and in ``compute_dtype`` elsewhere.
    """
    if name == "reference":
        return ReferenceBackend()
    if name == "triton":
        from .triton.backend import TritonBackend

        return TritonBackend(compute_dtype, memory_budget, float16)
    return TorchBackend(compute_dtype, memory_budget)


def requested(name: str) -> tuple[str, str]:
    """Return the name that is asked for, and what asks for it: the argument, or for "auto" the environment if set."""
    if name == "auto" and os.environ.get(VARIABLE):
        return os.environ[VARIABLE], VARIABLE
    return name, "backend"


def has_compute_dtype(name: str) -> bool:
    """True unless ``name`` asks for a backend whose products are all in the state's dtype."""
    return requested(name)[0] != ReferenceBackend.name


def _automatic(device: torch.device, dtype: torch.dtype | None) -> Choice:
    if device.type == "cpu":  # where Triton has nothing but its interpreter, which is for tests
        return Choice("torch", "the fastest on a CPU", automatic=True)
    reason = why_not_triton(device, dtype)
    if reason is None:
        return Choice("triton", "the fastest on a GPU", automatic=True)
    return Choice("torch", f"triton cannot run: {reason}", automatic=True)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
