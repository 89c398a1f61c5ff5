"""Granite: Llama's layout with multipliers of embedding, attention, residual stream and logits.

With windows (SWA), attention also has sinks. HyperCLOVA X multiplies the logits where Granite divides them, and may
have norms on the outputs. Granite 4 fuses gate and up projections. Its Micro, 1B and 350M consist of attention and MLPs
alone, and only these are decomposed.
"""

from dataclasses import replace
from typing import Any

from ..family import Family, first_half, second_half

MODEL_TYPES = ("granite", "granite_swa", "hyperclovax", "granitemoehybrid")


def declare(config: Any) -> Family:
    family = Family(factor=config.residual_multiplier, logit_scale=1.0 / config.logits_scaling)
    if config.model_type == "granite_swa":
        return replace(family, sinks=True, layer_windows=True)
    if config.model_type == "hyperclovax":
        norms = {"attention_output_norm": "post_norm1", "mlp_output_norm": "post_norm2"} if config.use_post_norm else {}
        return replace(family, logit_scale=config.logits_scaling, **norms)
    if config.model_type == "granitemoehybrid":
        if config.num_local_experts or {*config.layers_block_type} - {"attention", "full_attention"}:
            raise ValueError("model: this Granite 4 has Mamba layers or experts; only those without are supported.")
        return replace(
            family,
            mlp="shared_mlp",
            gate_proj="shared_mlp.input_linear",
            gate_part=first_half,
            up_proj="shared_mlp.input_linear",
            up_part=second_half,
            down_proj="shared_mlp.output_linear",
            act_fn="shared_mlp.activation",
        )
    return family
