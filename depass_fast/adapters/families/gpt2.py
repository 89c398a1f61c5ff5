"""GPT-2: LayerNorm, learned positions (part of their token), fused QKV in transposed layout, an ungated MLP."""

from typing import Any

from ..family import Family, third

MODEL_TYPES = ("gpt2",)


def declare(config: Any) -> Family:
    if config.add_cross_attention:
        raise ValueError("model: a GPT-2 with cross-attention reads more than its own residual stream; not supported.")
    return Family(
        layers="transformer.h",
        embedding="transformer.wte",
        final_norm="transformer.ln_f",
        norm="layer",
        attention="attn",
        attention_norm="ln_1",
        v_proj="attn.c_attn",
        v_part=third(2),
        q_proj="attn.c_attn",
        q_part=third(0),
        k_proj="attn.c_attn",
        k_part=third(1),
        o_proj="attn.c_proj",
        mlp_norm="ln_2",
        eager_scale=_scale,
        gate_proj="mlp.c_fc",
        up_proj=None,
        down_proj="mlp.c_proj",
    )


def _scale(attention: Any) -> float:
    """The scale of the logits. transformers 4 passes it to no attention function, and only its eager one applies it."""
    scale = attention.head_dim**-0.5 if attention.scale_attn_weights else 1.0
    return scale / (attention.layer_idx + 1) if attention.scale_attn_by_inverse_layer_idx else scale
