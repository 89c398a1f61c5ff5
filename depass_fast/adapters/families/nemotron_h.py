"""Nemotron-H: every layer is one of three, a Mamba-2 state space, attention, or an MLP."""

from dataclasses import replace
from typing import Any

from ..family import Family
from ..recurrent import with_state_space

MODEL_TYPES = ("nemotron_h",)


def declare(config: Any) -> Family:
    if "moe" in config.layers_block_type:
        raise ValueError(
            "model: this Nemotron-H has experts with one projection in, or behind a latent; not supported."
        )
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
    inner = config.mamba_num_heads * config.mamba_head_dim
    kinds = {
        "linear_attention": with_state_space(full, "mixer", inner, config.mamba_head_dim),
        "full_attention": full,
        "mlp": replace(both, attention=None, attention_norm=None),
    }
    return replace(full, kinds=tuple(kinds[kind] for kind in config.layers_block_type))
