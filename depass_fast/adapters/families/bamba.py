"""Bamba: Mamba-2's state spaces and, in some layers, attention; an MLP in each."""

from dataclasses import replace
from typing import Any

from ..family import Family
from ..recurrent import with_state_space

MODEL_TYPES = ("bamba",)


def declare(config: Any) -> Family:
    full = Family(
        final_norm="model.final_layernorm",
        mlp="feed_forward",
        mlp_norm="pre_ff_layernorm",
        gate_proj="feed_forward.gate_proj",
        up_proj="feed_forward.up_proj",
        down_proj="feed_forward.down_proj",
        act_fn="feed_forward.act_fn",
    )
    inner = int(config.mamba_expand * config.hidden_size)
    linear = with_state_space(full, "mamba", inner, inner // config.mamba_n_heads, config.hidden_act)
    kinds = {"linear_attention": linear, "full_attention": full}
    return replace(full, kinds=tuple(kinds[kind] for kind in config.layers_block_type))
