"""Mixtral: Mistral's layout with a mixture of experts for an MLP."""

from typing import Any

from ..family import Experts, Family

MODEL_TYPES = ("mixtral",)


def declare(config: Any) -> Family:
    return Family(
        mlp=("mlp", "block_sparse_moe"),
        experts=Experts(
            top_k=config.num_experts_per_tok,
            normalised=True,
            router=("mlp.gate", "block_sparse_moe.gate"),
            experts=("mlp.experts", "block_sparse_moe.experts"),
            gate="w1",
            up="w3",
            down="w2",
        ),
    )
