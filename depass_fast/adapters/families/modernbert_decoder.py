"""The decoder of ModernBERT: no norm in front of the first attention, and a head in front of the unembedding."""

from dataclasses import replace
from typing import Any

from ..family import Family, first_half, second_half

MODEL_TYPES = ("modernbert-decoder",)


def declare(config: Any) -> Family:
    projections: dict[str, Any] = {f"{name}_proj": f"attn.{name}_proj" for name in "qkv"}
    family = Family(
        embedding="model.embeddings.tok_embeddings",
        final_norm="model.final_norm",
        head="lm_head",
        unembedding="decoder",
        norm="layer",
        attention="attn",
        attention_norm="attn_norm",
        o_proj="attn.Wo",
        mlp_norm="mlp_norm",
        gate_proj="mlp.Wi",
        gate_part=first_half,
        up_proj="mlp.Wi",
        up_part=second_half,
        down_proj="mlp.Wo",
        **projections,
    )
    first = replace(family, attention_norm=None)
    return replace(family, kinds=(first, *[family] * (config.num_hidden_layers - 1)))
