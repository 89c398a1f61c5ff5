"""DeepSeek 3's mixtures, or very similar ones, in Llama's layout: GLM-4.5, dots.llm1, K-EXAONE, Solar Open, HunYuan 3.

The first layers may be dense. The router has scores of groups, a bias that corrects them, and a scale: all frozen.
Kolibri 1 has norms on the outputs, too. HunYuan 3 as released (`enable_moe_fp32_combine`) sums its experts in float32,
whatever it computes in: in float64 a result is complete to that rounding.
"""

from typing import Any

from ..family import Experts, Family

MODEL_TYPES = ("glm4_moe", "dots1", "exaone_moe", "solar_open", "hy_v3", "kolibri1")


def declare(config: Any) -> Family:
    outputs = {"attention_output_norm": "post_self_attn_layernorm", "mlp_output_norm": "post_mlp_layernorm"}
    norms: dict[str, Any] = outputs if config.model_type == "kolibri1" else {}
    return Family(
        experts=Experts(top_k=config.num_experts_per_tok, shared="mlp.shared_experts"),
        **norms,
    )
