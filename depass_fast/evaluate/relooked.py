"""The model run with one head looking elsewhere, and where it looks when a component is taken out of its input."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..engine import DePass
from ..looking.logits import logits_of
from ..looking.sides import Sides
from ..looking.without import BOTH, KEY, QUERY, whole
from ..trace.attention import causal_attention
from ..trace.exclusive import change_config, exclusive
from ..trace.record import AttentionTrace, Trace

RELOOKED_NAME = "depass_fast_relooked"

active = threading.local()  # `held`: where this thread's passes look


@dataclass(frozen=True)
class _Held:
    layers: list[AttentionTrace]
    places: dict[int, int]
    layer: int
    head: int
    probabilities: Tensor  # (B, N, N)

    def attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
        known = id(module) in self.places  # a pruned model's layers keep their old numbers
        index = self.places[id(module)] if known else module.layer_idx
        one = self.layers[index]
        out, _ = causal_attention(q, k, v, one.scale, one.window, one.softcap, sinks=sinks, chunked=one.chunked)
        if index == self.layer:
            values = v[:, self.head // (q.shape[1] // v.shape[1])]  # (B, N, d)
            out[:, self.head] = (self.probabilities.to(values.dtype) @ values).to(out.dtype)
        return out.transpose(1, 2).contiguous()


@contextmanager
def looking(engine: DePass, trace: Trace, layer: int, head: int, probabilities: Tensor) -> Iterator[None]:
    """Have one head look as ``probabilities`` (B, N, N) say, in passes of B rows of N tokens; all else reacts.

    ``engine`` is one that :func:`depass_fast.evaluate.frozen.check_freezable` takes. The model is handed back as it
    was, also after an exception.
    """
    adapter = engine.adapter
    places = {id(adapter.module(index, "attention")): index for index in range(adapter.n_layers)}
    with exclusive(adapter) as undo:
        change_config(adapter, "_attn_implementation", RELOOKED_NAME, undo)
        undo.callback(setattr, active, "held", getattr(active, "held", None))
        active.held = _Held([one.attention for one in trace.layers], places, layer, head, probabilities)
        yield


def probabilities_of(sides: Sides, record: AttentionTrace, head: int) -> Tensor:
    """Return where a head looks, given queries and keys of one prompt: (N, N), without a sink's part."""
    n = len(sides.q)
    found = logits_of(sides, record, slice(0, n), slice(head, head + 1), torch.arange(n, device=sides.q.device))
    return found.values.softmax(-1)[0, :, :n]


def sides_without(sides: Sides, x: Tensor, part: Tensor, taken_out: str, norms_react: bool = True) -> Sides:
    """Return queries and keys as the model makes them of its input ``x`` (N, D) less ``part`` (N, D).

    ``taken_out`` says whether the queries, the keys or both miss it. Norms are of what is left where they ``react``,
    else they are held at what they were.
    """
    made = {}
    for name, side, own in (("q", sides.of_q, sides.q), ("k", sides.of_k, sides.k)):
        if taken_out in (BOTH, QUERY if name == "q" else KEY):
            made[name] = whole(side, x - part) if norms_react else own - side.read(part, slice(None))
    return replace(sides, **made)


def _attention_function(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention function that transformers calls by name."""
    held: _Held | None = getattr(active, "held", None)
    if held is None:
        raise RuntimeError("another thread has a head of this model look elsewhere; run it when that is done.")
    return held.attend(module, query, key, value, kwargs.get("s_aux")), None


ALL_ATTENTION_FUNCTIONS.register(RELOOKED_NAME, _attention_function)
