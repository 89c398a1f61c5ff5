"""Multi-head latent attention: keys and values of all heads come from one latent, behind a norm of its own.

Youtu has Llama's layout beside it; MiniCPM 3 scales what a branch adds, and the logits.
"""

from typing import Any

from torch import Tensor

from ..family import Family

MODEL_TYPES = ("youtu", "minicpm3")


def declare(config: Any) -> Family:
    if config.attention_bias:
        raise ValueError("model: its latent has a bias (attention_bias), which meets a norm in the middle of V's path.")
    heads, rank, wide = config.num_attention_heads, config.kv_lora_rank, config.v_head_dim
    scales: dict[str, float] = {}
    if config.model_type == "minicpm3":
        factor = config.scale_depth / config.num_hidden_layers**0.5
        scales = {"factor": factor, "logit_scale": 1.0 / config.logits_scaling}

    def values(weight: Tensor) -> Tensor:
        return weight.unflatten(0, (heads, -1))[:, -wide:].flatten(0, 1)  # of [k1; v1; k2; v2; ...]

    return Family(
        v_proj="self_attn.kv_a_proj_with_mqa",
        v_part=lambda weight: weight[:rank],
        v_norm="self_attn.kv_a_layernorm",
        v_up="self_attn.kv_b_proj",
        v_up_part=values,
        value_dim=wide,
        key_dim=config.qk_nope_head_dim + config.qk_rope_head_dim,
        **scales,
    )
