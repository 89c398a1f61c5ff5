"""Laguna: softplus of a projection gates every head, or every channel; layers have numbers of heads of their own."""

from typing import Any

from torch import Tensor
from torch.nn.functional import softplus

from ..family import Experts, Family, HeadScale
from ..recurrent import wide

MODEL_TYPES = ("laguna",)


def declare(config: Any) -> Family:
    return Family(
        head_scale=HeadScale(("g_proj",), _gate),
        experts=Experts(
            top_k=config.num_experts_per_tok,
            shared="mlp.shared_experts",
            routed_factor=config.moe_routed_scaling_factor,
        ),
    )


def _gate(attention: Any, outputs: list[Tensor], heads: Tensor) -> Tensor:
    gate = softplus(wide(outputs[0])).to(heads.dtype)
    return gate.repeat_interleave(heads.shape[1] // gate.shape[1], 1)
