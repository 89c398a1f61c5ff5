"""MiniMax M3, its text model: norms as Gemma's, an indexer that selects blocks of keys, gpt-oss's activation."""

from functools import lru_cache
from typing import Any

import torch

from ..activation import Activation
from ..family import Experts, Family, first_half, second_half

MODEL_TYPES = ("minimax_m3_vl_text",)


def declare(config: Any) -> Family:
    if config.index_n_heads != config.num_key_value_heads and "minimax_m3_sparse" in config.layer_types:
        raise ValueError("model: its indexer has other heads (index_n_heads) than there are groups of heads.")
    return Family(
        norm_offset=1.0,
        selects=config.index_topk_blocks * config.index_block_size,
        key_block=config.index_block_size,
        gate_proj="mlp.gate_up_proj",
        gate_part=first_half,
        up_proj="mlp.gate_up_proj",
        up_part=second_half,
        act_fn=None,
        activation=_clamped(config.swiglu_limit, config.swiglu_alpha),
        experts=Experts(
            top_k=config.num_experts_per_tok,
            shared="mlp.shared_experts",
            gate="gate_up_proj",
            fused=True,
            routed_factor=config.routed_scaling_factor,
            activation=lambda held: _clamped(held.swiglu_limit, held.swiglu_alpha),
        ),
    )


@lru_cache(maxsize=8)  # the same for all experts and layers
def _clamped(limit: float, alpha: float) -> Activation:
    return Activation(lambda x: x * torch.sigmoid(alpha * x), gate_limit=limit, up_limit=limit, up_offset=1.0)
