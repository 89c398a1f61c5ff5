"""Exclusive use of a model: one forward pass of ours at a time, and every change to the model undone at its end."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from ..adapters import Adapter

one_at_a_time = threading.RLock()  # hooks and attention implementation belong to the model, not to a thread


@contextmanager
def exclusive(adapter: Adapter) -> Iterator[ExitStack]:
    """Hold the model for this thread, uncompiled, and in float64 with eager experts. Yield the stack that undoes it."""
    with one_at_a_time, ExitStack() as undo:
        if "torch._dynamo" in sys.modules:  # else nothing has been compiled, and importing it takes seconds
            undo.enter_context(torch.compiler.set_stance("force_eager"))
        if adapter.dtype == torch.float64:
            change_config(adapter, "_experts_implementation", "eager", undo)  # the others know no float64
        change_config(adapter, "max_inference_chunksize", sys.maxsize, undo)  # one call of every layer (xLSTM)
        yield undo


def change_config(adapter: Adapter, name: str, value: Any, undo: ExitStack) -> None:
    """Change an entry of the model's config until the end, if it has that entry."""
    if hasattr(adapter.config, name):
        undo.callback(setattr, adapter.config, name, getattr(adapter.config, name))
        setattr(adapter.config, name, value)
