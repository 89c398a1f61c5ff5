"""Phi-1, 1.5 and 2: LayerNorm, partial rotary embedding, attention and MLP in parallel behind the same norm."""

from typing import Any

from ..family import Family

MODEL_TYPES = ("phi",)


def declare(config: Any) -> Family:
    return Family(
        final_norm="model.final_layernorm",
        norm="layer",
        parallel=True,
        o_proj="self_attn.dense",
        mlp_norm="input_layernorm",
        gate_proj="mlp.fc1",
        up_proj=None,
        down_proj="mlp.fc2",
    )
