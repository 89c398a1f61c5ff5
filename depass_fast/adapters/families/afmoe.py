"""AFMoE (Arcee Trinity): a sigmoid gates every head, norms lie on both sides of a branch, later layers are mixtures."""

from typing import Any

import torch

from ..family import Experts, Family, HeadScale

MODEL_TYPES = ("afmoe",)


def declare(config: Any) -> Family:
    return Family(
        head_scale=HeadScale(("gate_proj",), lambda attention, outputs, heads: torch.sigmoid(outputs[0])),
        attention_output_norm="post_attention_layernorm",
        mlp_norm="pre_mlp_layernorm",
        mlp_output_norm="post_mlp_layernorm",
        experts=Experts(top_k=config.num_experts_per_tok, router="mlp.router", shared="mlp.shared_experts"),
    )
