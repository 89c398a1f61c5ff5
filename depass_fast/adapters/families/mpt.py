"""MPT: LayerNorm without β, ALiBi, fused QKV that may be clamped, an ungated MLP."""

from typing import Any

from torch import Tensor

from ..family import Family, Observed, third

MODEL_TYPES = ("mpt",)


def declare(config: Any) -> Family:
    return Family(
        layers="transformer.blocks",
        embedding="transformer.wte",
        final_norm="transformer.norm_f",
        norm="layer",
        attention="attn",
        attention_norm="norm_1",
        v_proj="attn.Wqkv",
        v_part=third(2),
        q_proj="attn.Wqkv",
        q_part=third(0),
        k_proj="attn.Wqkv",
        k_part=third(1),
        v_clip=config.attn_config.clip_qkv or None,  # 0 stands for none, too
        o_proj="attn.out_proj",
        observed=Observed(("Wqkv",), _read),
        alibi=True,
        mlp="ffn",
        mlp_norm="norm_2",
        gate_proj="ffn.up_proj",
        up_proj=None,
        down_proj="ffn.down_proj",
        act_fn="ffn.act",
    )


def _read(attention: Any, outputs: list[Tensor], kwargs: dict[str, Any]) -> dict[str, Any]:
    fused, limit = outputs[0], attention.clip_qkv
    fused = fused.clamp(-limit, limit) if limit else fused
    q, k, v = fused.unflatten(-1, (3, attention.n_heads, -1)).permute(2, 0, 3, 1, 4)
    alibi = kwargs["position_bias"][:, 0].T  # (longest, H), the last key's at the end
    return {"q": q, "k": k, "v": v, "scale": attention.softmax_scale, "key_bias": lambda n: alibi[-n:]}
