"""GPT-J: LayerNorm, attention and MLP in parallel behind the same norm, rotary embedding of neighbouring pairs.

CodeGen fuses its projections in four blocks of a quarter of the heads each, [Q; V; K].
"""

import sys
from typing import Any

import torch
from torch import Tensor

from ..family import Family, Observed, of_each_head

MODEL_TYPES = ("gptj", "codegen")

_BLOCKS = 4  # blocks of a fused projection


def declare(config: Any) -> Family:
    fused = config.model_type == "codegen"
    return Family(
        layers="transformer.h",
        embedding="transformer.wte",
        final_norm="transformer.ln_f",
        norm="layer",
        parallel=True,
        attention="attn",
        attention_norm="ln_1",
        v_proj="attn.qkv_proj" if fused else "attn.v_proj",
        v_part=of_each_head(_BLOCKS, 3, 1) if fused else None,
        q_proj="attn.qkv_proj" if fused else "attn.q_proj",
        q_part=of_each_head(_BLOCKS, 3, 0) if fused else None,
        k_proj="attn.qkv_proj" if fused else "attn.k_proj",
        k_part=of_each_head(_BLOCKS, 3, 2) if fused else None,
        o_proj="attn.out_proj",
        observed=Observed(("qkv_proj",) if fused else ("q_proj", "k_proj", "v_proj"), _read),
        mlp_norm="ln_1",
        gate_proj="mlp.fc_in",
        up_proj=None,
        down_proj="mlp.fc_out",
    )


def _read(attention: Any, outputs: list[Tensor], kwargs: dict[str, Any]) -> dict[str, Any]:
    if len(outputs) == 1:
        q, v, k = outputs[0].unflatten(-1, (_BLOCKS, 3, -1)).unbind(-2)  # (1, T, 4, C / 4)
        outputs = [x.flatten(-2) for x in (q, k, v)]
    heads, rotary = attention.num_attention_heads, attention.rotary_dim or attention.head_dim
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in outputs)  # (1, T, H, d)
    sin, cos = attention.embed_positions.to(q.device)[kwargs["position_ids"]].to(q.dtype).chunk(2, dim=-1)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    q, k = (torch.cat([rotate(x[..., :rotary], sin, cos), x[..., rotary:]], dim=-1) for x in (q, k))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return {"q": q, "k": k, "v": v, "scale": attention.head_dim**-0.5}
