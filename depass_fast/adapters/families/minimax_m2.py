"""MiniMax M2: Llama's layout with norms across all heads of Q and of K, partial rotary embedding, sigmoid routers."""

from typing import Any

from ..family import Experts, Family

MODEL_TYPES = ("minimax_m2",)


def declare(config: Any) -> Family:
    return Family(experts=Experts(top_k=config.num_experts_per_tok))
