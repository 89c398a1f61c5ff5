"""GPT-1: GPT-2's layout with LayerNorm on the residual stream itself, after every branch, and none at the end."""

from typing import Any

from torch import Tensor

from ..family import Family, Observed, third

MODEL_TYPES = ("openai-gpt",)


def declare(config: Any) -> Family:
    return Family(
        layers="transformer.h",
        embedding="transformer.tokens_embed",
        final_norm=None,
        norm="layer",
        attention="attn",
        attention_norm=None,
        attention_stream_norm="ln_1",
        v_proj="attn.c_attn",
        v_part=third(2),
        q_proj="attn.c_attn",
        q_part=third(0),
        k_proj="attn.c_attn",
        k_part=third(1),
        o_proj="attn.c_proj",
        observed=Observed(("c_attn",), _read),
        mlp_norm=None,
        mlp_stream_norm="ln_2",
        gate_proj="mlp.c_fc",
        up_proj=None,
        down_proj="mlp.c_proj",
    )


def _read(attention: Any, outputs: list[Tensor], kwargs: dict[str, Any]) -> dict[str, Any]:
    q, k, v = outputs[0].unflatten(-1, (3, attention.n_head, -1)).permute(2, 0, 3, 1, 4)
    return {"q": q, "k": k, "v": v, "scale": v.shape[-1] ** -0.5}
