"""A forward pass in which nothing is replaced, to compare the recorded one with."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters import Adapter
from ..adapters.head_experts import watch_heads
from .exclusive import exclusive
from .head_experts import CHOSEN, WEIGHTS
from .selection import by_query, seen_in


@dataclass
class UntouchedPass:
    """The end of a forward pass over N positions, and the decisions of its mixtures of experts and indexers of keys.

    ``end`` (N, D) is the output of the last norm. ``decisions`` holds, in their order, the layer of every decision and
    what belongs to it, under the names that a :class:`depass_fast.trace.recorder.Recorder` gives them: the experts'
    input, the router's weights and its choices, or the residual stream and the keys, or experts of heads, selected.
    """

    end: Tensor
    decisions: list[tuple[int, dict[str, Tensor]]]


@torch.no_grad()
def untouched_pass(adapter: Adapter, ids: Tensor) -> UntouchedPass:
    """Run the model over ``ids`` (N,) with its own attention, and look at it through hooks that change nothing."""
    watcher = _Watcher()
    with exclusive(adapter) as undo:
        for index in range(adapter.n_layers):
            if adapter.has_indexer(index):
                watcher.watch_indexer(adapter, index, undo)
            if adapter.kind(index).head_experts is not None:
                watcher.watch_heads(adapter, index, undo)
            if adapter.is_mixture(index):
                watcher.watch_experts(adapter, index, undo)
        end = adapter.final_norm_module or adapter.end_module
        undo.callback(end.register_forward_hook(watcher.note_end).remove)
        adapter.run(ids[None])
    assert watcher.end is not None
    return UntouchedPass(watcher.end, watcher.decisions)


@dataclass
class _Watcher:
    """Keeps what its hooks see in the thread that made it; other threads may use the model meanwhile."""

    end: Tensor | None = None
    decisions: list[tuple[int, dict[str, Tensor]]] = field(default_factory=list)
    thread: int = field(default_factory=threading.get_ident)

    def note_end(self, module: nn.Module, args: tuple, output: Any) -> None:
        if threading.get_ident() == self.thread:
            self.end = (output[0] if isinstance(output, tuple | list) else output).detach().flatten(0, -2)

    def watch_experts(self, adapter: Adapter, index: int, undo: ExitStack) -> None:
        """Hook up the mixture of one layer."""

        def read(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if threading.get_ident() == self.thread:
                x = args[0] if args else kwargs["hidden_states"]
                self.decisions.append((index, {"experts_input": x.detach().flatten(0, -2)}))

        def decided(weights: Tensor, chosen: Tensor) -> None:
            if threading.get_ident() == self.thread:
                self.decisions[-1][1].update(router_weights=weights.detach(), chosen=chosen)

        undo.callback(adapter.experts_module(index).register_forward_pre_hook(read, with_kwargs=True).remove)
        undo.callback(adapter.watch_router(index, decided))

    def watch_indexer(self, adapter: Adapter, index: int, undo: ExitStack) -> None:
        """Hook up the indexer that selects the keys of one layer."""

        width = adapter.selects if adapter.kind(index).selects_by_mask else None

        def selects(module: nn.Module, args: tuple, indices: Tensor) -> None:
            if threading.get_ident() == self.thread:
                self.decisions[-1][1]["chosen_keys"] = by_query(indices if width is None else seen_in(indices, width))

        indexer = adapter.module(index, "indexer")
        assert indexer is not None
        self._read_stream(adapter, index, undo)
        undo.callback(indexer.register_forward_hook(selects).remove)

    def watch_heads(self, adapter: Adapter, index: int, undo: ExitStack) -> None:
        """Hook up the router of one layer that decides which heads a position has."""

        def decided(weights: Tensor, chosen: Tensor) -> None:
            if threading.get_ident() == self.thread:
                self.decisions[-1][1].update({WEIGHTS: weights.detach(), CHOSEN: chosen})

        declared = adapter.kind(index).head_experts
        assert declared is not None
        self._read_stream(adapter, index, undo)
        undo.callback(watch_heads(adapter.block(index), declared, decided))

    def _read_stream(self, adapter: Adapter, index: int, undo: ExitStack) -> None:
        """Begin a decision of one layer with the residual stream that its attention reads."""

        def read(module: nn.Module, args: tuple) -> None:
            if threading.get_ident() == self.thread:
                self.decisions.append((index, {"resid_pre": args[0].detach().flatten(0, -2)}))

        norm = adapter.module(index, "attention_norm")
        norm = adapter.module(index, "attention") if norm is None else norm
        undo.callback(norm.register_forward_pre_hook(read).remove)
