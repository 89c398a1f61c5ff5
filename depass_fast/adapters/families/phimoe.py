"""Phi-3.5 MoE: LayerNorm, a mixture of two experts in every layer, chosen one after the other by a sparse mixer."""

import sys
from typing import Any

from torch import Tensor

from ..family import Experts, Family, Observed

MODEL_TYPES = ("phimoe",)


def declare(config: Any) -> Family:
    def decide(layer: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
        mixer = sys.modules[type(layer).__module__].sparsemixer
        return mixer(logits, jitter_eps=config.router_jitter_noise, training=False)

    return Family(
        norm="layer",
        observed=Observed(("q_proj", "k_proj", "v_proj"), _read),
        window=config.sliding_window,
        mlp=("mlp", "block_sparse_moe"),
        experts=Experts(
            top_k=2,
            router=("mlp.router", "block_sparse_moe.gate"),
            experts=("mlp.experts", "block_sparse_moe.experts"),
            gate="w1",
            up="w3",
            down="w2",
            decide=decide,
        ),
    )


def _read(attention: Any, outputs: list[Tensor], kwargs: dict[str, Any]) -> dict[str, Any]:
    q, k, v = (x.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for x in outputs)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    q, k = rotate(q, k, *kwargs["position_embeddings"], kwargs["position_ids"])
    return {"q": q, "k": k, "v": v, "scale": attention.head_dim**-0.5}
