"""Nemotron-H: every layer is one of four, a Mamba-2 state space, attention, an MLP, or ungated experts."""

from dataclasses import replace
from typing import Any

from ..family import Experts, Family
from ..recurrent import with_state_space

MODEL_TYPES = ("nemotron_h",)


def declare(config: Any) -> Family:
    latent = getattr(config, "moe_latent_size", None) is not None
    if "moe" in config.layers_block_type and latent and config.mlp_bias:
        raise ValueError("model: its experts' latent has a bias (mlp_bias), which no expert can carry.")
    both = Family(
        embedding="model.embeddings",
        final_norm="model.norm_f",
        attention="mixer",
        attention_norm="norm",
        v_proj="mixer.v_proj",
        q_proj="mixer.q_proj",
        k_proj="mixer.k_proj",
        o_proj="mixer.o_proj",
        mlp="mixer",
        mlp_norm="norm",
        gate_proj="mixer.up_proj",
        up_proj=None,
        down_proj="mixer.down_proj",
        act_fn="mixer.act_fn",
    )
    full = replace(both, mlp=None, mlp_norm=None)
    alone = replace(both, attention=None, attention_norm=None)
    inner = config.mamba_num_heads * config.mamba_head_dim
    kinds = {
        "linear_attention": with_state_space(full, "mixer", inner, config.mamba_head_dim, config.mamba_hidden_act),
        "full_attention": full,
        "mlp": alone,
        "moe": replace(alone, experts=_experts(config, latent)),
    }
    return replace(full, kinds=tuple(kinds[kind] for kind in config.layers_block_type))


def _experts(config: Any, latent: bool) -> Experts:
    return Experts(
        top_k=config.num_experts_per_tok,
        router="mixer.gate",
        experts="mixer.experts",
        stacks=("up_proj", "down_proj"),
        gate="up_proj",
        up=None,
        shared="mixer.shared_experts",
        latent=("mixer.fc1_latent_proj", "mixer.fc2_latent_proj") if latent else None,
    )
