"""Our attention function, which transformers calls by its name while a model is traced."""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..adapters import Adapter
from . import attention
from .recorder import Recorder
from .selection import register_with_mask, seen_in

ATTENTION_NAME = "depass_fast_recorder"
SELECTING_NAME = "depass_fast_recorder_with_mask"  # for models whose indexers read a mask

active = threading.local()  # `recorder`: the recorder of this thread's forward pass


def attention_name(adapter: Adapter) -> str:
    """The name of our attention function for this model."""
    reads_mask = adapter.selects is not None and not adapter.has_keyed()
    return SELECTING_NAME if reads_mask else ATTENTION_NAME


def is_recording(recorder: Recorder) -> bool:
    """True if the forward pass of this thread is that recorder's."""
    return getattr(active, "recorder", None) is recorder


def _attention_function(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,  # built for an unpacked sequence, or not at all: ours comes from the offsets
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls by name: it leaves everything to this thread's recorder."""
    recorder: Recorder | None = getattr(active, "recorder", None)
    if recorder is None:
        raise RuntimeError("this model is being traced by depass_fast in another thread; run it when that is done.")
    if scaling is None:
        scaling = recorder.adapter.scale(module, recorder.implementation) or query.shape[-1] ** -0.5
    known = id(module) in recorder.places  # a pruned model's layers keep their old indices
    index = recorder.places[id(module)] if known else module.layer_idx
    window = recorder.adapter.window(index, sliding_window, recorder.implementation)
    softcap = None if recorder.implementation == "sdpa" else softcap  # sdpa has none: older versions ignore it
    mask: dict[str, Any] = {"scale": scaling, "window": window, "softcap": softcap}
    if recorder.adapter.kind(index).mixer is not None and index not in recorder.besides:
        # the mixer computes it, prompt by prompt; here the first prompt's is compared
        return attention.causal_attention(query, key, value, **mask, position_bias=position_bias)[0].transpose(
            1, 2
        ), None
    mask["chunked"] = recorder.adapter.chunks(index)
    if recorder.adapter.kind(index).selects_by_mask and attention_mask is not None:
        assert recorder.adapter.selects is not None
        indices = seen_in(attention_mask, recorder.adapter.selects)
    if block_indices is not None:
        indices, mask["key_block"] = block_indices, recorder.adapter.kind(index).key_block
    return recorder.attend(index, query, key, value, sinks=s_aux, indices=indices, **mask), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _attention_function)
register_with_mask(SELECTING_NAME, _attention_function)
