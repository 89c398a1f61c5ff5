"""CTRL: LayerNorm, a scaled embedding, sinusoidal positions, an ungated MLP with ReLU."""

from typing import Any

from ..family import Family, Observed, read_plain

MODEL_TYPES = ("ctrl",)


def declare(config: Any) -> Family:
    return Family(
        layers="transformer.h",
        embedding="transformer.w",
        final_norm="transformer.layernorm",
        norm="layer",
        attention="multi_head_attention",
        attention_norm="layernorm1",
        v_proj="multi_head_attention.Wv",
        q_proj="multi_head_attention.Wq",
        k_proj="multi_head_attention.Wk",
        o_proj="multi_head_attention.dense",
        observed=Observed(("Wq", "Wk", "Wv"), read_plain),
        mlp="ffn",
        mlp_norm="layernorm2",
        gate_proj="ffn.0",
        up_proj=None,
        down_proj="ffn.2",
        act_fn="ffn.1",
    )
