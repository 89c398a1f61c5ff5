"""ERNIE 4.5 MoE: Llama's layout with mixtures in some layers, whose router corrects its choice by a bias."""

from typing import Any

from torch import Tensor

from ..family import Experts, Family

MODEL_TYPES = ("ernie4_5_moe",)


def declare(config: Any) -> Family:
    def decide(layer: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The choice that the mixture of transformers 4 makes by its router's logits."""
        weights = logits.float().softmax(-1)
        chosen = layer.mlp.moe_statics(weights).topk(config.moe_k, dim=-1).indices
        weights = weights.gather(-1, chosen)
        return weights / weights.sum(-1, keepdim=True).clamp_min(config.moe_norm_min), chosen

    return Family(experts=Experts(top_k=config.moe_k, decide=decide, shared="mlp.shared_experts"))
