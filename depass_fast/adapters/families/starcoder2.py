"""StarCoder 2: LayerNorm, biases everywhere, a sliding window, an ungated MLP."""

from typing import Any

from ..family import Family

MODEL_TYPES = ("starcoder2",)


def declare(config: Any) -> Family:
    return Family(norm="layer", gate_proj="mlp.c_fc", up_proj=None, down_proj="mlp.c_proj")
