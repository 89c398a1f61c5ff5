"""GPT-J: LayerNorm, attention and MLP in parallel behind the same norm, rotary embedding of neighbouring pairs."""

import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..family import Family, Observed

MODEL_TYPES = ("gptj",)


def declare(config: Any) -> Family:
    return Family(
        layers="transformer.h",
        embedding="transformer.wte",
        final_norm="transformer.ln_f",
        norm="layer",
        parallel=True,
        attention="attn",
        attention_norm="ln_1",
        v_proj="attn.v_proj",
        o_proj="attn.out_proj",
        observed=Observed(("q_proj", "k_proj", "v_proj"), _read),
        mlp_norm="ln_1",
        gate_proj="mlp.fc_in",
        down_proj="mlp.fc_out",
    )


def _read(attention: nn.Module, outputs: list[Tensor], kwargs: dict[str, Any]) -> dict[str, Any]:
    heads, rotary = attention.num_attention_heads, attention.rotary_dim or attention.head_dim
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in outputs)  # (1, T, H, d)
    sin, cos = attention.embed_positions.to(q.device)[kwargs["position_ids"]].to(q.dtype).chunk(2, dim=-1)
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    q, k = (torch.cat([rotate(x[..., :rotary], sin, cos), x[..., rotary:]], dim=-1) for x in (q, k))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return {"q": q, "k": k, "v": v, "scale": attention.head_dim**-0.5}
