"""Zamba 2: Mamba-2 in every layer, and in some a transformer block in front of it that such layers share.

The block reads the stream and the first embedding, its output goes to Mamba alone. Such a layer is declared as two.
Every use of a block has adapters of its own.
"""

from typing import Any

from ..family import Family, first_half, second_half
from ..recurrent import with_state_space
from ..shared_block import SharedBlock, with_shared_blocks

MODEL_TYPES = ("zamba2",)


def declare(config: Any) -> Family:
    inner = int(config.mamba_expand * config.hidden_size)

    def mamba(below: str, streams: SharedBlock) -> Family:
        layer = Family(attention_norm=f"{below}input_layernorm", mlp=None, mlp_norm=None, streams=streams)
        return with_state_space(layer, f"{below}mamba", inner, inner // config.n_mamba_heads, "silu")

    def parts(mlp: str, number: int) -> dict[str, Any]:
        both = f"{mlp}.gate_up_proj"
        values = f"shared_transformer.self_attn.linear_v_adapter_list.{number}"
        return {
            "gate_proj": both,
            "gate_part": first_half,
            "up_proj": both,
            "up_part": second_half,
            "gate_adapter": f"{both}_adapter_list.{number}",
            "v_adapter": values if config.use_shared_attention_adapter else None,
        }

    return with_shared_blocks(config.layers_block_type, mamba, "shared_transformer", parts)
