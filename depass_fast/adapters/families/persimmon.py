"""Persimmon: LayerNorm, QKV interleaved by head, partial rotary embedding, an ungated MLP with squared ReLU."""

from typing import Any

from torch import Tensor

from ..family import Family, Observed, of_each_head, read_rotary

MODEL_TYPES = ("persimmon",)


def declare(config: Any) -> Family:
    return Family(
        final_norm="model.final_layernorm",
        norm="layer",
        v_proj="self_attn.query_key_value",
        v_part=of_each_head(config.num_attention_heads, 3, 2),
        q_proj="self_attn.query_key_value",
        q_part=of_each_head(config.num_attention_heads, 3, 0),
        k_proj="self_attn.query_key_value",
        k_part=of_each_head(config.num_attention_heads, 3, 1),
        o_proj="self_attn.dense",
        observed=Observed(("query_key_value",), _read),
        gate_proj="mlp.dense_h_to_4h",
        up_proj=None,
        down_proj="mlp.dense_4h_to_h",
    )


def _read(attention: Any, outputs: list[Tensor], kwargs: dict[str, Any]) -> dict[str, Any]:
    parts = outputs[0].unflatten(-1, (attention.num_heads, 3, -1)).unbind(3)  # (1, T, H, d)
    return read_rotary(attention, [x.flatten(-2) for x in parts], kwargs)
