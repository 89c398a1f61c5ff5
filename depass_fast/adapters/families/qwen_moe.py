"""Qwen 2 MoE and Qwen 3 MoE: Qwen's layout with mixtures of experts in some layers; Qwen 2 has a shared expert.

Mellum 2 has Qwen 3's mixtures, and windows in some layers. Flint has these with sinks and a shared expert. Qwen 2 may
have windows, too, which its attention does not announce (from transformers 5 on).
"""

from typing import Any

from ..family import Experts, Family, Observed, read_rotary

MODEL_TYPES = ("qwen2_moe", "qwen3_moe", "mellum", "flint")


def declare(config: Any) -> Family:
    shared: dict[str, Any] = {"shared": "mlp.shared_expert"} if config.model_type in ("qwen2_moe", "flint") else {}
    shared |= {"shared_gate": "mlp.shared_expert_gate"} if config.model_type == "qwen2_moe" else {}
    kinds = getattr(config, "layer_types", None) if config.model_type == "qwen2_moe" else None  # by which it is masked
    return Family(
        window=kinds and tuple(config.sliding_window if kind == "sliding_attention" else None for kind in kinds),
        sinks=config.model_type == "flint",
        observed=Observed(("q_proj", "k_proj", "v_proj"), read_rotary),
        experts=Experts(top_k=config.num_experts_per_tok, normalised=config.norm_topk_prob, **shared),
    )
