"""Granite 4: Mamba-2's state spaces and, in some layers, attention; an MLP, or a mixture of experts beside it."""

from dataclasses import replace
from typing import Any

from ..family import Experts, Family, first_half, second_half
from ..recurrent import with_state_space

MODEL_TYPES = ("granitemoehybrid",)


def declare(config: Any) -> Family:
    common: dict[str, Any] = {"factor": config.residual_multiplier, "logit_scale": 1.0 / config.logits_scaling}
    full = Family(
        mlp="shared_mlp",
        gate_proj="shared_mlp.input_linear",
        gate_part=first_half,
        up_proj="shared_mlp.input_linear",
        up_part=second_half,
        down_proj="shared_mlp.output_linear",
        act_fn="shared_mlp.activation",
        **common,
    )
    if config.num_local_experts:
        experts = Experts(
            top_k=config.num_experts_per_tok,
            router="block_sparse_moe.router",
            experts="block_sparse_moe.experts",
            act_fn=("act_fn", "activation"),
            shared="shared_mlp",
            gate="input_linear",
            fused=True,
            down="output_linear",
        )
        full = Family(mlp="block_sparse_moe", experts=experts, **common)
    recurrent = [kind in ("linear_attention", "mamba") for kind in config.layers_block_type]
    if not any(recurrent):
        return full
    inner = int(config.mamba_expand * config.hidden_size)
    linear = with_state_space(full, "mamba", inner, inner // config.mamba_n_heads, config.hidden_act)
    return replace(full, kinds=tuple(linear if one else full for one in recurrent))
