"""Granite: Llama's layout with multipliers of embedding, attention, residual stream and logits.

With windows (SWA), attention also has sinks. HyperCLOVA X multiplies the logits where Granite divides them, and may
have norms on the outputs.
"""

from dataclasses import replace
from typing import Any

from ..family import Family

MODEL_TYPES = ("granite", "granite_swa", "hyperclovax")


def declare(config: Any) -> Family:
    family = Family(factor=config.residual_multiplier, logit_scale=1.0 / config.logits_scaling)
    if config.model_type == "granite_swa":
        return replace(family, sinks=True, layer_windows=True)
    if config.model_type == "hyperclovax":
        norms = {"attention_output_norm": "post_norm1", "mlp_output_norm": "post_norm2"} if config.use_post_norm else {}
        return replace(family, logit_scale=config.logits_scaling, **norms)
    return family
