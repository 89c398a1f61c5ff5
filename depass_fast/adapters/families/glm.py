"""GLM-4: Llama's layout with fused gate and up projections and biases on Q, K and V.

From GLM-4-0414 on (`glm4`) there are norms on the outputs, too.
"""

from typing import Any

from ..family import Family, first_half, second_half

MODEL_TYPES = ("glm", "glm4")


def declare(config: Any) -> Family:
    outputs = {"attention_output_norm": "post_self_attn_layernorm", "mlp_output_norm": "post_mlp_layernorm"}
    norms: dict[str, Any] = outputs if config.model_type == "glm4" else {}
    fused: dict[str, Any] = {"gate_proj": "mlp.gate_up_proj", "up_proj": "mlp.gate_up_proj"}
    return Family(**fused, gate_part=first_half, up_part=second_half, **norms)
