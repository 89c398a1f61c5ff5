"""DeepSeek V2 and V3 and what is built like them: values come from a latent, and experts are chosen in groups.

GLM-4.7-Flash, Youtu and MiniCPM3 share the attention; Kimi K2 and Moonlight are DeepSeek V3.
"""

from typing import Any

from torch import Tensor

from ..family import Family

MODEL_TYPES = ("deepseek_v2", "deepseek_v3")


def declare(config: Any) -> Family:
    if getattr(config, "attention_bias", False):
        raise ValueError("model: its latent has a bias (attention_bias), which has no place in the propagation.")
    heads, rank, wide = config.num_attention_heads, config.kv_lora_rank, config.v_head_dim

    def values(weight: Tensor) -> Tensor:
        return weight.unflatten(0, (heads, -1))[:, -wide:].flatten(0, 1)

    return Family(
        v_proj="self_attn.kv_a_proj_with_mqa",
        v_part=lambda weight: weight[:rank],
        v_norm="self_attn.kv_a_layernorm",
        v_up="self_attn.kv_b_proj",
        v_up_part=values,
        value_dim=wide,
        key_dim=config.qk_nope_head_dim + config.qk_rope_head_dim,
    )
