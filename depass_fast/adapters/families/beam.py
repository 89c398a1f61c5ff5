"""Beam: gated heads, norms on both sides of a branch, and residual connections whose factors depend on the depth.

Its MLPs compute their activations in float32, whatever the model computes in: in float64 that is the limit.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..family import Experts, Family, HeadScale

MODEL_TYPES = ("beam",)


def declare(config: Any) -> Family:
    common = Family(
        logit_cap=config.final_logit_softcapping,
        head_scale=HeadScale(("gate_proj",), _gate),
        attention_output_norm="post_attention_layernorm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_output_norm="post_feedforward_layernorm",
        experts=Experts(top_k=config.num_experts_per_tok, factor=config.routed_scaling_factor),
    )

    def kind(index: int) -> Family:
        before = 2 * index + 1  # terms in the stream; then (√before · stream + branch) / √(before + 1)
        keeps = [(n / (n + 1)) ** 0.5 for n in (before, before + 1)]
        factors = {"factor": before**-0.5, "mlp_factor": (before + 1) ** -0.5}
        return replace(common, attention_keeps=keeps[0], mlp_keeps=keeps[1], **factors)

    return replace(common, kinds=tuple(map(kind, range(config.num_hidden_layers))))


def _gate(attention: Any, outputs: list[Tensor], heads: Tensor) -> Tensor:
    return torch.sigmoid(outputs[0] + attention.gate_bias.repeat_interleave(attention.head_dim))
