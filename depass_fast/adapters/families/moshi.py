"""Moshi's text model (Helium): Llama's layout with projections inside another module, and a fused gate and up."""

from typing import Any

from ..family import Family, first_half, second_half

MODEL_TYPES = ("moshi",)


def declare(config: Any) -> Family:
    return Family(
        v_proj="self_attn.v_proj.linear",
        q_proj="self_attn.q_proj.linear",
        k_proj="self_attn.k_proj.linear",
        o_proj="self_attn.o_proj.linear",
        gate_proj="mlp.fc1",
        gate_part=first_half,
        up_proj="mlp.fc1",
        up_part=second_half,
        down_proj="mlp.fc2",
    )
