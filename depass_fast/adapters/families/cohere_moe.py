"""Command A MoE: Command R7B's layout with mixtures in all but the first layers, and perhaps a shared expert."""

from typing import Any

from ..family import Experts, Family

MODEL_TYPES = ("cohere2_moe",)


def declare(config: Any) -> Family:
    averaged = config.num_shared_experts > 0 and config.shared_expert_combination_strategy == "average"
    return Family(
        logit_scale=config.logit_scale,
        norm="layer" if config.rms_norm_eps is None else "rms",
        parallel=True,
        layer_windows=True,
        mlp_norm="input_layernorm",
        experts=Experts(
            top_k=config.num_experts_per_tok,
            shared="mlp.shared_experts",
            factor=0.5 if averaged else 1.0,
        ),
    )
