"""Apertus and Arcee (AFM): Llama's layout with an ungated MLP: xIELU, or squared ReLU."""

from typing import Any

from ..family import Family

MODEL_TYPES = ("apertus", "arcee")


def declare(config: Any) -> Family:
    apertus: dict[str, Any] = {"attention_norm": "attention_layernorm", "mlp_norm": "feedforward_layernorm"}
    norms = apertus if config.model_type == "apertus" else {}
    return Family(gate_proj="mlp.up_proj", up_proj=None, **norms)
