"""Granite: Llama's layout with multipliers of embedding, attention, residual stream and logits.

HyperCLOVA X multiplies the logits where Granite divides them, and may have norms on the outputs, too.
"""

from typing import Any

from ..family import Family

MODEL_TYPES = ("granite", "hyperclovax")


def declare(config: Any) -> Family:
    if config.model_type == "granite":
        return Family(factor=config.residual_multiplier, logit_scale=1.0 / config.logits_scaling)
    outputs = {"attention_output_norm": "post_norm1", "mlp_output_norm": "post_norm2"} if config.use_post_norm else {}
    return Family(factor=config.residual_multiplier, logit_scale=config.logits_scaling, **outputs)
