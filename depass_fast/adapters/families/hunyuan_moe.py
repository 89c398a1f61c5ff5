"""HunYuan MoE (A13B): Llama's layout with norms on Q and K, a mixture and a shared expert in every layer."""

from typing import Any

from ..family import Experts, Family

MODEL_TYPES = ("hunyuan_v1_moe",)


def declare(config: Any) -> Family:
    chosen = {config.moe_topk} if isinstance(config.moe_topk, int) else set(config.moe_topk)
    if len(chosen) > 1:
        raise ValueError(f"model: its layers choose different numbers of experts ({sorted(chosen)}); not supported.")
    return Family(qk_norm_last=True, experts=Experts(top_k=chosen.pop(), normalised=True, shared="mlp.shared_mlp"))
