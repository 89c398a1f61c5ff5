"""The model run again with the attention of a trace: its probabilities are held, everything else reacts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..adapters import Adapter
from .attention import attention_probabilities
from .exclusive import change_config, exclusive
from .record import AttentionTrace, Trace

FROZEN_NAME = "depass_fast_frozen"

active = threading.local()  # `held`: what this thread's passes attend with


@dataclass(frozen=True)
class Held:
    """The recorded attention of every layer, and the layer of an attention module by its id."""

    layers: list[AttentionTrace]
    places: dict[int, int]

    def attend(self, module: Any, value: Tensor) -> Tensor:
        """Multiply values (B, Hkv, N, d) with the recorded probabilities: (B, N, H, d)."""
        known = id(module) in self.places  # a pruned model's layers keep their old numbers
        index = self.places[id(module)] if known else module.layer_idx
        attention, n = self.layers[index], value.shape[2]
        if n != len(attention.q):
            raise ValueError(f"ids: rows of {n} tokens; the attention that is held is of {len(attention.q)}.")
        everything = torch.arange(n, device=attention.q.device)
        p = attention_probabilities(attention, everything, everything, torch.promote_types(value.dtype, torch.float32))
        wide = value.repeat_interleave(p.shape[0] // value.shape[1], dim=1).to(p)
        return (p @ wide).to(value.dtype).transpose(1, 2).contiguous()


@contextmanager
def held_attention(adapter: Adapter, trace: Trace) -> Iterator[None]:
    """Hold the attention probabilities of all layers at those of ``trace``, a prompt of N tokens, until the end.

    Rows of N tokens, any number of them, then run through the model with values, norms and MLPs of their own. The
    model is handed back as it was, also after an exception.

    Raises:
        ValueError: the trace holds several prompts, or is of another model or other weights; the attention of this
            family is no function that can be replaced.
    """
    check_holdable(adapter)
    trace.source.check(adapter.model)
    if trace.n_prompts != 1:
        raise ValueError(f"trace: it holds {trace.n_prompts} prompts; attention is held for one.")
    places = {id(adapter.module(index, "attention")): index for index in range(adapter.n_layers)}
    with exclusive(adapter) as undo:
        change_config(adapter, "_attn_implementation", FROZEN_NAME, undo)
        undo.callback(setattr, active, "held", getattr(active, "held", None))
        active.held = Held([layer.attention for layer in trace.layers], places)
        yield


def check_holdable(adapter: Adapter) -> None:
    """Raise ValueError where the attention of this model cannot be replaced."""
    adapter.check_uniform("model: held attention")
    adapter.check_selects_nothing("model: held attention")
    if adapter.observed is not None:
        kind = type(adapter.module(0, "attention")).__name__
        raise ValueError(
            f"model: its attention ({kind}) does not go through transformers' attention interface, so that its "
            "probabilities cannot be held; take a model of another family, or a newer transformers."
        )


def _attention_function(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention function that transformers calls by name: only the values count."""
    held: Held | None = getattr(active, "held", None)
    if held is None:
        raise RuntimeError("another thread holds this model's attention frozen; run it when that is done.")
    return held.attend(module, value), None


ALL_ATTENTION_FUNCTIONS.register(FROZEN_NAME, _attention_function)
