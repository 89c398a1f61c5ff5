"""Zamba 2: Mamba-2 in every layer, and in some a transformer block in front of it that such layers share.

The block reads the stream and the first embedding, its output goes to Mamba alone. Such a layer is declared as two.
"""

from dataclasses import replace
from typing import Any

from ..family import Family, first_half, second_half
from ..recurrent import with_state_space
from ..shared_block import SharedBlock

MODEL_TYPES = ("zamba2",)


def declare(config: Any) -> Family:
    inner = int(config.mamba_expand * config.hidden_size)

    def mamba(below: str, streams: SharedBlock) -> Family:
        home = Family(attention_norm=f"{below}input_layernorm", mlp=None, mlp_norm=None, streams=streams)
        return with_state_space(home, f"{below}mamba", inner, inner // config.n_mamba_heads)

    alone, behind = mamba("", SharedBlock("alone")), mamba("mamba_decoder.", SharedBlock("mixer"))
    kinds, homes = [], []
    for index, kind in enumerate(config.layers_block_type):
        if kind == "hybrid":
            kinds.append(_block(config, config.hybrid_layer_ids.index(index)))
            homes.append(index)
        kinds.append(behind if kind == "hybrid" else alone)
        homes.append(index)
    return replace(alone, final_norm="model.final_layernorm", kinds=tuple(kinds), homes=tuple(homes))


def _block(config: Any, number: int) -> Family:
    """The shared block as it is used in that one of the layers with it."""
    block = "shared_transformer"
    attention, mlp = f"{block}.self_attn", f"{block}.feed_forward"
    return Family(
        attention=attention,
        attention_norm=f"{block}.input_layernorm",
        v_proj=f"{attention}.v_proj",
        v_adapter=f"{attention}.linear_v_adapter_list.{number}" if config.use_shared_attention_adapter else None,
        o_proj=f"{attention}.o_proj",
        mlp=mlp,
        mlp_norm=f"{block}.pre_ff_layernorm",
        gate_proj=f"{mlp}.gate_up_proj",
        gate_part=first_half,
        up_proj=f"{mlp}.gate_up_proj",
        up_part=second_half,
        gate_adapter=f"{mlp}.gate_up_proj_adapter_list.{number}",
        down_proj=f"{mlp}.down_proj",
        down_behind="linear",
        act_fn=f"{mlp}.act_fn",
        streams=SharedBlock("block"),
    )
