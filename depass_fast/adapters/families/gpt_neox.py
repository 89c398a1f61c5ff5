"""GPT-NeoX and Pythia: LayerNorm, partial rotary embedding, QKV interleaved by head, attention and MLP in parallel.

The Japanese GPT-NeoX is sequential and without biases, but for one behind the attention of the last layer.
"""

import sys
from typing import Any

import torch
from torch import Tensor

from ..family import Family, Observed, of_each_head

MODEL_TYPES = ("gpt_neox", "gpt_neox_japanese")


def declare(config: Any) -> Family:
    home, japanese = config.model_type, config.model_type == "gpt_neox_japanese"
    return Family(
        layers=f"{home}.layers",
        embedding=f"{home}.embed_in",
        final_norm=f"{home}.final_layer_norm",
        unembedding=("lm_head", "embed_out"),
        norm="layer",
        parallel=not japanese and config.use_parallel_residual,
        attention="attention",
        v_proj="attention.query_key_value",
        v_part=of_each_head(config.num_attention_heads, 3, 2),
        q_proj="attention.query_key_value",
        q_part=of_each_head(config.num_attention_heads, 3, 0),
        k_proj="attention.query_key_value",
        k_part=of_each_head(config.num_attention_heads, 3, 1),
        o_proj="attention.dense",
        o_bias="attention.dense_bias" if japanese else None,
        observed=Observed(("query_key_value",), _read),
        gate_proj="mlp.dense_h_to_4h",
        up_proj=None,
        down_proj="mlp.dense_4h_to_h",
    )


def _read(attention: Any, outputs: list[Tensor], kwargs: dict[str, Any]) -> dict[str, Any]:
    q, k, v = outputs[0].unflatten(-1, (attention.num_attention_heads, 3, -1)).permute(3, 0, 2, 1, 4)
    width, rotate = attention.rotary_ndims, sys.modules[type(attention).__module__].apply_rotary_pos_emb
    turned = rotate(q[..., :width], k[..., :width], *kwargs["position_embeddings"])
    q, k = (torch.cat([new, x[..., width:]], dim=-1) for new, x in zip(turned, (q, k), strict=True))
    return {"q": q, "k": k, "v": v, "scale": attention.head_size**-0.5}
