"""Nemotron 4 and Minitron: LayerNorm that stores γ - 1, partial rotary embedding, an ungated MLP with squared ReLU.

Jais 2 has LayerNorm that stores γ.
"""

from typing import Any

from ..family import Family, Observed, read_rotary

MODEL_TYPES = ("nemotron", "jais2")


def declare(config: Any) -> Family:
    return Family(
        norm="layer",
        norm_offset=1.0 if config.model_type == "nemotron" else 0.0,
        observed=Observed(("q_proj", "k_proj", "v_proj"), read_rotary),
        gate_proj="mlp.up_proj",
        up_proj=None,
    )
