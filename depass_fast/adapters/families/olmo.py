"""OLMo 1: LayerNorm without parameters, values that may be clamped. OLMo 2: norms on the outputs only."""

from typing import Any

from ..family import Family

MODEL_TYPES = ("olmo", "olmo2")


def declare(config: Any) -> Family:
    if config.model_type == "olmo":
        return Family(norm="layer", v_clip=config.clip_qkv)
    return Family(
        attention_norm=None,
        attention_output_norm="post_attention_layernorm",
        mlp_norm=None,
        mlp_output_norm="post_feedforward_layernorm",
    )
