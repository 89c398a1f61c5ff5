"""StarCoder 1 and SantaCoder: GPT-2's layout with linear modules; one KV head behind all queries, or QKV by head."""

from typing import Any

from torch import Tensor

from ..family import Family, Observed, of_each_head

MODEL_TYPES = ("gpt_bigcode",)


def declare(config: Any) -> Family:
    if config.add_cross_attention:
        raise ValueError("model: with cross-attention it reads more than its own residual stream; not supported.")
    heads = config.num_attention_heads
    head_dim = config.hidden_size // heads
    return Family(
        layers="transformer.h",
        embedding="transformer.wte",
        final_norm="transformer.ln_f",
        norm="layer",
        attention="attn",
        attention_norm="ln_1",
        v_proj="attn.c_attn",
        v_part=(lambda weight: weight[-head_dim:]) if config.multi_query else of_each_head(heads, 3, 2),
        q_proj="attn.c_attn",
        q_part=(lambda weight: weight[: -2 * head_dim]) if config.multi_query else of_each_head(heads, 3, 0),
        k_proj="attn.c_attn",
        k_part=(lambda weight: weight[-2 * head_dim : -head_dim]) if config.multi_query else of_each_head(heads, 3, 1),
        o_proj="attn.c_proj",
        observed=Observed(("c_attn",), _read),
        mlp_norm="ln_2",
        gate_proj="mlp.c_fc",
        up_proj=None,
        down_proj="mlp.c_proj",
    )


def _read(attention: Any, outputs: list[Tensor], kwargs: dict[str, Any]) -> dict[str, Any]:
    heads, d = attention.num_heads, attention.head_dim
    if attention.multi_query:
        q, k, v = outputs[0].split((heads * d, d, d), dim=-1)
        q, k, v = q.unflatten(-1, (heads, d)), k.unsqueeze(2), v.unsqueeze(2)  # (1, T, H or 1, d)
    else:
        q, k, v = outputs[0].unflatten(-1, (heads, 3, d)).unbind(3)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return {"q": q, "k": k, "v": v, "scale": d**-0.5 if attention.scale_attn_weights else 1.0}
