"""BLOOM: LayerNorm, ALiBi, QKV interleaved by head, an ungated MLP."""

from typing import Any

from torch import Tensor

from ..family import Family, Observed, of_each_head

MODEL_TYPES = ("bloom",)


def declare(config: Any) -> Family:
    if config.apply_residual_connection_post_layernorm:
        raise ValueError("model: this BLOOM puts its residual connections after the norms; not supported.")
    return Family(
        layers="transformer.h",
        embedding="transformer.word_embeddings",
        final_norm="transformer.ln_f",
        norm="layer",
        attention="self_attention",
        v_proj="self_attention.query_key_value",
        v_part=of_each_head(config.n_head, 3, 2),
        q_proj="self_attention.query_key_value",
        q_part=of_each_head(config.n_head, 3, 0),
        k_proj="self_attention.query_key_value",
        k_part=of_each_head(config.n_head, 3, 1),
        o_proj="self_attention.dense",
        observed=Observed(("query_key_value",), _read),
        alibi=True,
        gate_proj="mlp.dense_h_to_4h",
        up_proj=None,
        down_proj="mlp.dense_4h_to_h",
        act_fn="mlp.gelu_impl",
    )


def _read(attention: Any, outputs: list[Tensor], kwargs: dict[str, Any]) -> dict[str, Any]:
    q, k, v = outputs[0].unflatten(-1, (attention.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)
    alibi = kwargs["alibi"][:, 0].T  # (T, H)
    return {"q": q, "k": k, "v": v, "scale": attention.inv_norm_factor, "key_bias": lambda n: alibi[:n]}
