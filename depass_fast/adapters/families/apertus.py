"""Apertus and Arcee (AFM): Llama's layout with an ungated MLP: xIELU, or squared ReLU."""

from typing import Any

from ..family import Family

MODEL_TYPES = ("apertus", "arcee")


def declare(config: Any) -> Family:
    apertus = {"attention_norm": "attention_layernorm", "mlp_norm": "feedforward_layernorm"}
    return Family(gate_proj="mlp.up_proj", **(apertus if config.model_type == "apertus" else {}))
