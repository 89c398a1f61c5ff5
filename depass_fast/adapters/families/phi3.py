"""Phi-3 and Phi-4: Llama's layout with fused QKV and fused gate and up projections.

A Phi-4 that also sees and hears is decomposed on text.
"""

from typing import Any

from ..family import Family, first_half, second_half

MODEL_TYPES = ("phi3", "phi4_multimodal")


def declare(config: Any) -> Family:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = values = config.num_key_value_heads * head_dim
    return Family(
        v_proj="self_attn.qkv_proj",
        v_part=lambda weight: weight[-values:],
        q_proj="self_attn.qkv_proj",
        q_part=lambda weight: weight[: -keys - values],
        k_proj="self_attn.qkv_proj",
        k_part=lambda weight: weight[-keys - values : -values],
        gate_proj="mlp.gate_up_proj",
        gate_part=first_half,
        up_proj="mlp.gate_up_proj",
        up_part=second_half,
    )
