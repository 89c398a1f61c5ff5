"""DBRX: LayerNorm without β, a clamped fused QKV, and mixtures whose experts lie one below another in flat tensors."""

from typing import Any

from ..family import Experts, Family

MODEL_TYPES = ("dbrx",)


def declare(config: Any) -> Family:
    attention, ffn = config.attn_config, config.ffn_config
    values = attention.kv_n_heads * (config.d_model // config.n_heads)
    fused = "norm_attn_norm.attn.Wqkv"
    return Family(
        layers="transformer.blocks",
        embedding="transformer.wte",
        final_norm="transformer.norm_f",
        norm="layer",
        attention="norm_attn_norm.attn",
        attention_norm="norm_attn_norm.norm_1",
        q_proj=fused,
        q_part=lambda weight: weight[: -2 * values],
        k_proj=fused,
        k_part=lambda weight: weight[-2 * values : -values],
        v_proj=fused,
        v_part=lambda weight: weight[-values:],
        v_clip=attention.clip_qkv,
        o_proj="norm_attn_norm.attn.out_proj",
        mlp="ffn",
        mlp_norm="norm_attn_norm.norm_2",
        experts=Experts(
            top_k=ffn.moe_top_k,
            router="ffn.router",
            experts="ffn.experts",
            stacks=("mlp.w1", "mlp.v1", "mlp.w2"),
            flat=ffn.moe_num_experts,
            act_fn="mlp.activation_fn",
        ),
    )
