"""Variants of families whose layers are put together otherwise than Llama's (see family_models.py)."""

from __future__ import annotations

from typing import Any

from tests.support.family_shapes import EXPERTS, GQA, GROUPED, LATENT, LOCAL, MHA, SHAPE, VISION

_LLAMA4 = {
    "head_dim": 8,
    "pad_token_id": 0,
    "intermediate_size": 16,
    "intermediate_size_mlp": 40,
    "num_local_experts": 4,
    "attention_chunk_size": 4,
    "no_rope_layers": [1, 0, 1],
    "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
}
_NEMOTRON = {
    "head_dim": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 6,
    "layers_block_type": ["linear_attention", "full_attention", "moe"],
    "n_group": 1,
    "topk_group": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 24,
    "routed_scaling_factor": 1.5,
}
_FALCON = {
    "head_dim": 8,
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 6,
    "attention_in_multiplier": 0.8,
    "attention_out_multiplier": 1.3,
    "ssm_in_multiplier": 1.2,
    "ssm_out_multiplier": 0.7,
    "ssm_multipliers": [0.9, 1.1, 1.2, 0.8, 1.3],
    "mlp_multipliers": [1.5, 0.6],
    "key_multiplier": 1.4,
    "lm_head_multiplier": 0.5,
    "embedding_multiplier": 2.0,
}
_MINIMAX = {
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "intermediate_size": 16,
    "block_size": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_attn_alpha_factor": 3.0,
    "linear_attn_beta_factor": 1.2,
    "full_attn_alpha_factor": 2.0,
    "full_attn_beta_factor": 0.8,
    "mlp_alpha_factor": 2.5,
    "mlp_beta_factor": 1.1,
}
_JETMOE = {"kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 16}
_INKLING = {
    "head_dim": 8,
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 1,
    "swa_head_dim": 6,
    "sliding_window_size": 3,
    "d_rel": 4,
    "rel_extent": 5,
    "conv_kernel_size": 3,
    "layer_types": ["hybrid", "hybrid_sliding", "hybrid"],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "logits_mup_width_multiplier": 2.0,
}
_ENDS = ["sparse", "dense", "sparse"]
_BAILING = {
    "pad_token_id": 0,
    "kv_lora_rank": 10,
    "q_lora_rank": None,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "linear_head_dim": 6,
    "linear_num_heads": 4,
    "num_experts_per_tok": 2,
    "num_local_experts": 6,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "mlp_layer_types": _ENDS,
}

NEWER: dict[str, tuple[str, dict[str, Any]]] = {
    "llama4_text": (
        "llama4_text",
        {**GQA, **_LLAMA4, "num_experts_per_tok": 2, "moe_layers": [0, 2], "floor_scale": 2, "attn_scale": 0.5},
    ),
    "llama4_text: no QK norms, biases": (
        "llama4_text",
        {**MHA, **_LLAMA4, "use_qk_norm": False, "attn_temperature_tuning": False, "attention_bias": True},
    ),
    "llama4": ("llama4", {"text_config": {**SHAPE, **GQA, **_LLAMA4}, "vision_config": VISION}),
}

# those with recurrences, or with a norm, a gate or a router behind their heads
NEWER_MIXERS: dict[str, tuple[str, dict[str, Any]]] = {
    "nemotron_h: experts": ("nemotron_h", {**GQA, **_NEMOTRON, "moe_latent_size": 12}),
    "nemotron_h: experts without a latent, biases": (
        "nemotron_h",
        {**MHA, **_NEMOTRON, "attention_bias": True, "mlp_bias": True},
    ),
    "falcon_h1": ("falcon_h1", {**GQA, **_FALCON}),
    "falcon_h1: norms, biases": (
        "falcon_h1",
        {
            **MHA,
            **_FALCON,
            "head_dim": 12,
            "mamba_rms_norm": True,
            "projectors_bias": True,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "falcon_h1: norms in front of gates": (
        "falcon_h1",
        {**GQA, **_FALCON, "head_dim": 6, "mamba_rms_norm": True, "mamba_norm_before_gate": True},
    ),
    "minimax": ("minimax", {**GQA, **_MINIMAX}),
    "minimax: MHA, no linear attention last": (
        "minimax",
        {**MHA, **_MINIMAX, "layer_types": ["linear_attention", "full_attention", "full_attention"]},
    ),
    "bitnet": ("bitnet", {**GQA, "pad_token_id": 0}),
    "bitnet: MHA, biases": ("bitnet", {**MHA, "attention_bias": True, "hidden_act": "silu", "pad_token_id": 0}),
    "laguna": (
        "laguna",
        {
            **GQA,
            **LOCAL,
            **EXPERTS,
            "head_dim": 8,
            "shared_expert_intermediate_size": 24,
            "num_attention_heads_per_layer": [8, 4, 4],
            "moe_routed_scaling_factor": 1.5,
            "moe_router_logit_softcapping": 2.0,
        },
    ),
    "laguna: channels, biases": (
        "laguna",
        {**MHA, "head_dim": 8, "gating": "per-element", "mlp_layer_types": ["dense"] * 3, "attention_bias": True},
    ),
    "axk2": (
        "axk2",
        {
            **LATENT,
            **GROUPED,
            "index_topk": 3,
            "index_n_heads": 2,
            "index_head_dim": 6,
            "gated_norm_rank": 5,
            "eos_token_id": 2,
            "bos_token_id": 1,
        },
    ),
    "doge": ("doge", {**GQA, "attention_bias": True, "mlp_bias": True, "sliding_window": 3, "pad_token_id": 0}),
    "zaya": (
        "zaya",
        {
            **GQA,
            "head_dim": 8,
            "num_experts": 4,
            "moe_intermediate_size": 16,
            "router_hidden_size": 12,
            "lm_head_bias": True,
            "sliding_window": 3,
            "layer_types": ["hybrid", "hybrid_sliding", "hybrid"],
            "intermediate_size": None,
            "pad_token_id": 0,
        },
    ),
    "diffllama": ("diffllama", {**GQA, "attention_bias": True, "lambda_std_dev": 0.5, "pad_token_id": 0}),
    "beam": (
        "beam",
        {**GQA, **LOCAL, **EXPERTS, "head_dim": 8, "n_group": 2, "topk_group": 1, "mlp_layer_types": _ENDS},
    ),
    "jetmoe": ("jetmoe", {**GQA, **_JETMOE}),
    "jetmoe: MQA, three of five": (
        "jetmoe",
        {
            **_JETMOE,
            "num_key_value_heads": 1,
            "kv_channels": 6,
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "activation_function": "gelu",
            "tie_word_embeddings": False,
        },
    ),
    "inkling_text": ("inkling_text", {**GQA, **_INKLING, "log_scaling_n_floor": 3, "unpadded_vocab_size": 63}),
    "inkling_text: two dense layers": (
        "inkling_text",
        {**MHA, **_INKLING, "mlp_layer_types": ["dense", "sparse", "dense"], "n_shared_experts": 1},
    ),
    "bailing_hybrid": ("bailing_hybrid", {**MHA, **_BAILING}),
    "bailing_hybrid: unbounded": ("bailing_hybrid", {**MHA, **_BAILING, "kda_safe_gate": False}),
}
