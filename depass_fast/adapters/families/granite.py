"""Granite: Llama's layout with multipliers of embedding, attention, residual stream and logits."""

from typing import Any

from ..family import Family

MODEL_TYPES = ("granite",)


def declare(config: Any) -> Family:
    return Family(factor=config.residual_multiplier, logit_scale=1.0 / config.logits_scaling)
