"""How large a trace will be, told from a model's config alone.

The family's declaration says what is recorded (:mod:`depass_fast.capture`); the shapes are read from a model without
weights, on torch's meta device. Everything is recorded once per position, so that the size is a number of bytes per
position.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..adapters import Adapter, adapt

_INDEX = 8  # bytes of an id or a position


def trace_nbytes(config: Any, lengths: Sequence[int], dtype: torch.dtype) -> int:
    """The bytes that a trace of prompts of ``lengths`` tokens holds: :attr:`depass_fast.Trace.nbytes` of it.

    Args:
        config: transformers' config of a model of a supported family. No weights are loaded.
        lengths: tokens of every prompt; any number of prompts.
        dtype: of the model's weights, and so of what is recorded.

    It is exact, but where a family clamps its values (OLMo, MPT with ``clip_qkv``): then it is an upper bound, reached
    as soon as a single value in every layer is clamped. A mixture of experts records ``top_k`` rows per position and
    layer, whichever experts they go to.

    Raises:
        ValueError: the family is not supported.
    """
    return sum(lengths) * _bytes_per_position(_Key(config), dtype)


class _Key:
    """A config that is hashed by what it says."""

    def __init__(self, config: Any) -> None:
        self.config, self.text = config, f"{type(config)} {config.to_json_string(use_diff=False)}"

    def __hash__(self) -> int:
        return hash(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.text == other.text


@functools.lru_cache(maxsize=16)
def _bytes_per_position(key: _Key, dtype: torch.dtype) -> int:
    return bytes_per_position(without_weights(key.config), dtype)


def bytes_per_position(adapter: Adapter, dtype: torch.dtype) -> int:
    """What a trace holds of one position of a model of ``dtype``."""
    width, item = adapter.hidden_size, dtype.itemsize
    stream = 1 if adapter.final_norm_module is None else 2  # after the last layer, and after the final norm
    layers = sum(_layer(adapter, index, dtype) for index in range(adapter.n_layers))
    return _INDEX + stream * width * item + layers


def without_weights(config: Any) -> Adapter:
    """The adapter of a model with shapes and nothing else. Raises ValueError as :func:`trace_nbytes`."""
    home = next((base for base in type(config).__mro__ if base in MODEL_FOR_CAUSAL_LM_MAPPING), None)
    if home is None:
        raise ValueError(f"config: {type(config).__name__} is not the config of a causal language model.")
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"  # which every model has and every machine can run
    with torch.device("meta"):
        return adapt(MODEL_FOR_CAUSAL_LM_MAPPING[home](config))


def _layer(adapter: Adapter, index: int, dtype: torch.dtype) -> int:
    """Bytes per position of one layer: the fields of LayerTrace, AttentionTrace and MlpTrace."""
    layer, family, item = adapter.layer(index), adapter.family, dtype.itemsize
    wide = torch.promote_types(dtype, torch.float32).itemsize
    attention, mlps = layer.attention, layer.mlps
    streams = 2 + sum(branch.stream is not None for branch in (attention, layer.mlp))
    scales = sum(branch.output is not None for branch in (attention, layer.mlp))
    size = streams * adapter.hidden_size * item + scales * wide
    size += (attention.n_heads + attention.n_kv_heads) * (family.key_dim or attention.head_dim) * item
    size += 0 if family.v_norm is None else wide
    size += attention.n_heads * wide if family.alibi else 0
    size += attention.n_heads * wide if family.sinks else 0
    if family.v_clip is not None:
        size += attention.v.shape[0] * item
    if not adapter.is_mixture(index):
        return size + 2 * mlps[0].gate.shape[0] * item
    each = [2 * mlp.gate.shape[0] * item + item * mlp.down.has_bias for mlp in mlps]
    size += family.experts.top_k * (_INDEX + each[0])
    return size + sum(bytes_ for mlp, bytes_ in zip(mlps, each, strict=True) if mlp.name == "shared")
