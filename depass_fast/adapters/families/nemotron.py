"""Nemotron 4 and Minitron: LayerNorm that stores γ - 1, partial rotary embedding, an ungated MLP with squared ReLU."""

from typing import Any

from ..family import Family, Observed, read_rotary

MODEL_TYPES = ("nemotron",)


def declare(config: Any) -> Family:
    return Family(
        norm="layer",
        norm_offset=1.0,
        observed=Observed(("q_proj", "k_proj", "v_proj"), read_rotary),
        gate_proj="mlp.up_proj",
    )
