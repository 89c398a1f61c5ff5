"""LongCat Flash: two attentions and MLPs in a layer, and experts from in front of the first MLP to the end.

A layer is declared as two. The experts read what the first one's MLP reads, and are added behind the second one's.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor

from ..family import Experts, Family

MODEL_TYPES = ("longcat_flash",)


def declare(config: Any) -> Family:
    if config.attention_bias:
        raise ValueError("model: its latent has a bias (attention_bias), which meets a norm in the middle of V's path.")
    first, second = (_half(config, number) for number in (0, 1))
    experts = Experts(
        top_k=config.num_experts_per_tok,
        router="mlp.router",
        ahead=True,
        gives_back=config.zero_expert_num or 0,
    )
    kinds = (first, replace(second, experts=experts)) * config.num_layers
    return replace(first, homes=tuple(index // 2 for index in range(len(kinds))), kinds=kinds)


def _half(config: Any, number: int) -> Family:
    attention, rank, wide = f"self_attn.{number}", config.kv_lora_rank, config.v_head_dim

    def values(weight: Tensor) -> Tensor:
        return weight.unflatten(0, (config.num_attention_heads, -1))[:, -wide:].flatten(0, 1)

    return Family(
        attention=attention,
        attention_norm=f"input_layernorm.{number}",
        v_proj=f"{attention}.kv_a_proj_with_mqa",
        v_part=lambda weight: weight[:rank],
        v_norm=f"{attention}.kv_a_layernorm",
        v_norm_factor=(config.hidden_size / rank) ** 0.5,
        v_up=f"{attention}.kv_b_proj",
        v_up_part=values,
        value_dim=wide,
        key_dim=config.qk_nope_head_dim + config.qk_rope_head_dim,
        o_proj=f"{attention}.o_proj",
        mlp=f"mlps.{number}",
        mlp_norm=f"post_attention_layernorm.{number}",
        gate_proj=f"mlps.{number}.gate_proj",
        up_proj=f"mlps.{number}.up_proj",
        down_proj=f"mlps.{number}.down_proj",
        act_fn=f"mlps.{number}.act_fn",
    )
