"""GIT: BERT's layers behind a causal mask, with a norm of the stream after each branch, on text alone."""

from typing import Any

from torch import Tensor

from ..family import Family, Observed

MODEL_TYPES = ("git",)


def declare(config: Any) -> Family:
    return Family(
        layers="git.encoder.layer",
        embedding="git.embeddings.word_embeddings",
        final_norm=None,
        unembedding="output",
        norm="layer",
        attention="attention",
        attention_norm=None,
        attention_stream_norm="attention.output.LayerNorm",
        v_proj="attention.self.value",
        q_proj="attention.self.query",
        k_proj="attention.self.key",
        o_proj="attention.output.dense",
        observed=Observed(("self.query", "self.key", "self.value"), _read),
        always_observed=True,
        mlp="intermediate",
        mlp_norm=None,
        mlp_stream_norm="output.LayerNorm",
        gate_proj="intermediate.dense",
        up_proj=None,
        down_proj="output.dense",
        act_fn="intermediate.intermediate_act_fn",
    )


def _read(attention: Any, outputs: list[Tensor], kwargs: dict[str, Any]) -> dict[str, Any]:
    q, k, v = (x.unflatten(-1, (attention.self.num_attention_heads, -1)).transpose(1, 2) for x in outputs)
    return {"q": q, "k": k, "v": v, "scale": q.shape[-1] ** -0.5}
