"""JetMoE: a router chooses among experts of attention, each with queries and an output projection, and among MLPs."""

from typing import Any

import transformers
from torch import Tensor

from ..family import Experts, Family, HeadExperts, first_half, second_half

MODEL_TYPES = ("jetmoe",)


def declare(config: Any) -> Family:
    if int(transformers.__version__.split(".")[0]) < 5:
        raise ValueError(
            f"model: its attention can be traced in transformers 5.0 or newer, not {transformers.__version__}."
        )
    top_k, home = config.num_experts_per_tok, "self_attention.experts"
    return Family(
        attention="self_attention",
        v_proj="self_attention.kv_proj",
        v_part=second_half,
        q_proj=f"{home}.input_linear",
        k_proj="self_attention.kv_proj",
        k_part=first_half,
        o_proj=f"{home}.output_linear",
        head_experts=HeadExperts(
            count=config.num_local_experts,
            top_k=top_k,
            router=f"{home}.router",
            decide=lambda returned: _top_k(returned, top_k),
            bias=f"{home}.bias",
        ),
        mlp_bias="mlp.bias",
        experts=Experts(
            top_k=top_k,
            router="mlp.router",
            experts="mlp",
            stacks=("input_linear.weight", "output_linear.weight"),
            act_fn="activation",
            decide=lambda layer, returned: _top_k(returned, top_k),
        ),
    )


def _top_k(returned: Any, k: int) -> tuple[Tensor, Tensor]:
    """The choice that a router makes by its logits, and returns sorted by experts."""
    *_, weights, _, logits = returned
    largest, chosen = logits.topk(k, dim=-1)
    return largest.softmax(-1).to(weights), chosen
