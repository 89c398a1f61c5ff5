"""Falcon: LayerNorm, one or few KV heads in a fused QKV; rotary embedding or ALiBi; parallel in all but the oldest."""

import sys
from typing import Any

from torch import Tensor

from ..family import Family, Observed, Part

MODEL_TYPES = ("falcon",)


def declare(config: Any) -> Family:
    new = config.new_decoder_architecture
    parallel = new or config.parallel_attn
    two_norms = new and config.num_ln_in_parallel_attn in (None, 2)
    norm, fused = "ln_attn" if two_norms else "input_layernorm", "self_attention.query_key_value"
    return Family(
        layers="transformer.h",
        embedding="transformer.word_embeddings",
        final_norm="transformer.ln_f",
        norm="layer",
        parallel=parallel,
        attention="self_attention",
        attention_norm=norm,
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), fused),
        **dict(zip(("q_part", "k_part", "v_part"), _parts(config), strict=True)),
        o_proj="self_attention.dense",
        observed=Observed(("query_key_value",), _read),
        alibi=config.alibi,
        mlp_norm="ln_mlp" if two_norms else norm if parallel else "post_attention_layernorm",
        gate_proj="mlp.dense_h_to_4h",
        up_proj=None,
        down_proj="mlp.dense_4h_to_h",
    )


def _parts(config: Any) -> list[Part]:
    """Return the parts of Q, K and V: keys and values are beside the queries that share them, or behind all."""
    heads, kv, new = config.num_attention_heads, config.num_kv_heads, config.new_decoder_architecture
    groups = kv if new else 1 if config.multi_query else heads
    q, k, v = slice(-2), slice(-2, -1), slice(-1, None)
    return [lambda x, at=at: x.unflatten(0, (groups, heads // groups + 2, -1))[:, at].flatten(0, 2) for at in (q, k, v)]


def _read(attention: Any, outputs: list[Tensor], kwargs: dict[str, Any]) -> dict[str, Any]:
    q, k, v = attention._split_heads(outputs[0])  # (1, T, H, d), (1, T, Hkv, d), or repeated for every head
    if attention.new_decoder_architecture:
        k, v = (x[:, :, :: attention.num_heads // attention.num_kv_heads] for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scale, alibi = attention.inv_norm_factor, kwargs["alibi"]
    if alibi is None:
        q, k = sys.modules[type(attention).__module__].apply_rotary_pos_emb(q, k, *kwargs["position_embeddings"])
        return {"q": q, "k": k, "v": v, "scale": scale}
    times = 2 if attention.config._attn_implementation == "eager" else 1  # eager adds the mask, which holds it already
    bias = alibi.reshape(attention.num_heads, -1).T * (scale * times)  # (T, H)
    return {"q": q, "k": k, "v": v, "scale": scale, "key_bias": lambda n: bias[:n]}
