"""Multi-head latent attention: keys and values of all heads come from one latent, behind a norm of its own.

DeepSeek and GLM-4.7-Flash have mixtures beside it, Youtu and MiniCPM 3 Llama's MLP. A.X K1 has a norm on the outputs of
its mixtures, and none on those of its dense layers.
"""

from typing import Any

from torch import Tensor

from ..family import Experts, Family

MODEL_TYPES = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu", "minicpm3", "axk1")


def declare(config: Any) -> Family:
    if getattr(config, "attention_bias", False):
        raise ValueError("model: its latent has a bias (attention_bias), which meets a norm in the middle of V's path.")
    heads, rank, wide = config.num_attention_heads, config.kv_lora_rank, config.v_head_dim
    beside: dict[str, Any] = {}
    if config.model_type == "minicpm3":
        beside = {"factor": config.scale_depth / config.num_hidden_layers**0.5}
        beside["logit_scale"] = 1.0 / config.logits_scaling
    elif config.model_type != "youtu":  # a router is not in the first layers
        beside = {"experts": Experts(top_k=config.num_experts_per_tok, shared="mlp.shared_experts")}

    if config.model_type == "axk1":
        beside |= {"mlp_output_norm": "mlp.post_mlp_layernorm", "partial": ("mlp_output_norm",)}

    def values(weight: Tensor) -> Tensor:
        return weight.unflatten(0, (heads, -1))[:, -wide:].flatten(0, 1)  # of [k1; v1; k2; v2; ...]

    def keys(weight: Tensor) -> Tensor:
        return weight.unflatten(0, (heads, -1))[:, :-wide].flatten(0, 1)

    latent: dict[str, Any] = {}
    if config.q_lora_rank is not None:
        latent = {
            "q_proj": "self_attn.q_b_proj",
            "q_down": "self_attn.q_a_proj",
            "q_latent_norm": "self_attn.q_a_layernorm",
        }

    return Family(
        v_proj="self_attn.kv_a_proj_with_mqa",
        v_part=lambda weight: weight[:rank],
        v_norm="self_attn.kv_a_layernorm",
        v_up="self_attn.kv_b_proj",
        v_up_part=values,
        k_up_part=keys,
        k_shared_part=lambda weight: weight[rank:],
        value_dim=wide,
        key_dim=config.qk_nope_head_dim + config.qk_rope_head_dim,
        **latent,
        **beside,
    )
