"""Command R and R7B: LayerNorm without β, attention and MLP in parallel behind the same norm, scaled logits."""

from typing import Any

from ..family import Family

MODEL_TYPES = ("cohere", "cohere2")


def declare(config: Any) -> Family:
    return Family(
        logit_scale=config.logit_scale,
        norm="layer",
        parallel=True,
        layer_windows=True,
        mlp_norm="input_layernorm",
    )
