"""Variants of families whose layers read what an earlier place of the residual stream holds."""

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
}
