"""Command R and R7B: LayerNorm without β, attention and MLP in parallel behind the same norm, scaled logits.

Command R7B is also the text model of Cohere's Compass (`cohere_compass_text`), where the scale may be absent.
"""

from typing import Any

from ..family import Family

MODEL_TYPES = ("cohere", "cohere2", "cohere_compass_text")


def declare(config: Any) -> Family:
    return Family(
        logit_scale=1.0 if config.logit_scale is None else config.logit_scale,
        norm="layer",
        parallel=True,
        layer_windows=True,
        mlp_norm="input_layernorm",
    )
