"""Granite 3 MoE: Granite's layout with a mixture of experts in every layer, and perhaps a shared one beside it.

With windows (SWA), attention also has sinks.
"""

from typing import Any

from torch import Tensor

from ..family import Experts, Family, Observed, read_rotary

MODEL_TYPES = ("granitemoe", "granitemoeshared", "granitemoe_swa")


def declare(config: Any) -> Family:
    top_k, swa = config.num_experts_per_tok, config.model_type == "granitemoe_swa"
    return Family(
        factor=config.residual_multiplier,
        logit_scale=1.0 / config.logits_scaling,
        observed=Observed(("q_proj", "k_proj", "v_proj"), _read),
        sinks=swa,
        layer_windows=swa,
        mlp="block_sparse_moe",
        experts=Experts(
            top_k=top_k,
            router="block_sparse_moe.router",
            experts=("block_sparse_moe.experts", "block_sparse_moe"),
            stacks=(("gate_up_proj", "input_linear.weight"), ("down_proj", "output_linear.weight")),
            act_fn=("act_fn", "activation"),
            decide=lambda layer, returned: _top_k(returned[-1], top_k),
            shared="shared_mlp",
            gate="input_linear",
            fused=True,
            down="output_linear",
        ),
    )


def _top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The choice that the router of transformers 4 makes by its logits, and returns sorted by experts."""
    largest, chosen = logits.topk(k, dim=-1)
    return largest.softmax(-1), chosen


def _read(attention: Any, outputs: list[Tensor], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**read_rotary(attention, outputs, kwargs), "scale": attention.scaling}
