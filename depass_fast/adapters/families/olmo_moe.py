"""OLMoE: Llama's layout with norms across all heads of Q and of K, and values that may be clamped.

FlexOlmo has the layout of OLMo 2. All layers of both are mixtures of experts.
"""

from typing import Any

from torch import Tensor

from ..family import Experts, Family, Observed, read_rotary

MODEL_TYPES = ("olmoe", "flex_olmo")


def declare(config: Any) -> Family:
    experts = Experts(top_k=config.num_experts_per_tok, normalised=config.norm_topk_prob)
    if config.model_type == "olmoe":
        observed = Observed(("q_proj", "k_proj", "v_proj"), _read)
        return Family(v_clip=config.clip_qkv, observed=observed, experts=experts)
    return Family(
        attention_norm=None,
        attention_output_norm="post_attention_layernorm",
        mlp_norm=None,
        mlp_output_norm="post_feedforward_layernorm",
        experts=experts,
    )


def _read(attention: Any, outputs: list[Tensor], kwargs: dict[str, Any]) -> dict[str, Any]:
    q, k, v = outputs
    q, k, limit = attention.q_norm(q), attention.k_norm(k), attention.config.clip_qkv
    outputs = [q, k, v] if limit is None else [x.clamp(-limit, limit) for x in (q, k, v)]
    return read_rotary(attention, outputs, kwargs)
