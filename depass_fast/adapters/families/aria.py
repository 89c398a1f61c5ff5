"""Aria's text model: Llama's layout with mixtures whose experts are stored transposed, and a shared expert."""

from typing import Any

from ..family import Experts, Family

MODEL_TYPES = ("aria_text",)


def declare(config: Any) -> Family:
    return Family(
        experts=Experts(
            top_k=config.moe_topk,
            router="mlp.router",
            transposed=True,
            shared="mlp.shared_experts",
        )
    )
