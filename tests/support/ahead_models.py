"""Variants of families whose experts read ahead of their layer, or whose indexers select blocks for groups of heads."""

from __future__ import annotations

from typing import Any

from tests.support.family_shapes import LATENT

AHEAD: dict[str, tuple[str, dict[str, Any]]] = {
    "longcat_flash": (
        "longcat_flash",
        {
            **LATENT,
            "num_hidden_layers": 4,
            "head_dim": 4,
            "ffn_hidden_size": 48,
            "expert_ffn_hidden_size": 16,
            "n_routed_experts": 4,
            "zero_expert_num": 3,
            "moe_topk": 5,  # more than the four experts: some that give back what they read are always chosen
            "routed_scaling_factor": 1.5,
        },
    ),
    "minimax_m3_vl_text": (
        "minimax_m3_vl_text",
        {
            "num_key_value_heads": 2,
            "head_dim": 8,
            "rotary_dim": 4,
            "intermediate_size": 16,
            "dense_intermediate_size": 40,
            "shared_intermediate_size": 24,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "swiglu_limit": 0.7,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "layer_types": ["minimax_m3_sparse", "full_attention", "minimax_m3_sparse"],
            "index_n_heads": 2,
            "index_head_dim": 8,
            "index_block_size": 2,
            "index_topk_blocks": 2,
        },
    ),
}
