"""A forward pass in which nothing is replaced, to compare the recorded one with."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import Adapter
from .exclusive import exclusive


@dataclass
class UntouchedPass:
    """The end of a forward pass over N positions, and the decisions of its mixtures of experts.

    ``end`` (N, D) is the output of the last norm. ``mixtures`` holds, for every layer with experts, their input, the
    router's weights and its choices, under the names that a :class:`depass_fast.trace.recorder.Recorder` gives them.
    """

    end: Tensor
    mixtures: dict[int, dict[str, Tensor]]


@torch.no_grad()
def untouched_pass(adapter: Adapter, ids: Tensor) -> UntouchedPass:
    """Run the model over ``ids`` (N,) with its own attention, and look at it through hooks that change nothing."""
    watcher = _Watcher()
    with exclusive(adapter) as undo:
        for index in range(adapter.n_layers):
            if adapter.is_mixture(index):
                watcher.watch_experts(adapter, index, undo)
        end = adapter.final_norm_module or adapter.blocks[-1]
        undo.callback(end.register_forward_hook(watcher.note_end).remove)
        adapter.run(ids[None])
    assert watcher.end is not None
    return UntouchedPass(watcher.end, watcher.mixtures)


@dataclass
class _Watcher:
    """Keeps what its hooks see in the thread that made it; other threads may use the model meanwhile."""

    end: Tensor | None = None
    mixtures: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    thread: int = field(default_factory=threading.get_ident)

    def note_end(self, module: nn.Module, args: tuple, output: Any) -> None:
        if threading.get_ident() == self.thread:
            self.end = (output[0] if isinstance(output, tuple | list) else output).detach().flatten(0, -2)

    def watch_experts(self, adapter: Adapter, index: int, undo: ExitStack) -> None:
        """Hook up the mixture of one layer."""

        def read(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if threading.get_ident() == self.thread:
                x = args[0] if args else kwargs["hidden_states"]
                self.mixtures[index] = {"experts_input": x.detach().flatten(0, -2)}

        def decided(weights: Tensor, chosen: Tensor) -> None:
            if threading.get_ident() == self.thread:
                self.mixtures[index] |= {"router_weights": weights.detach(), "chosen": chosen}

        undo.callback(adapter.experts_module(index).register_forward_pre_hook(read, with_kwargs=True).remove)
        undo.callback(adapter.watch_router(index, decided))
