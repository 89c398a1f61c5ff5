"""The small shapes of the tests' random models: parts of configs that variants of families share."""

from __future__ import annotations

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
GQA = {"num_key_value_heads": 2}
MHA = {"num_key_value_heads": 4}
BIASES = {"attention_bias": True, "mlp_bias": True}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SIGMOID = {  # DeepSeek 3's router
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.7,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
}
LOCAL = {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
GEMMA = {**GQA, "head_dim": 16, "query_pre_attn_scalar": 24}
GEMMA3 = {**GEMMA, **LOCAL, "sliding_window_pattern": 2}
LOCAL_ROPE = {
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e2,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 14,
    "patch_size": 14,
}
MULTIPLIERS = {
    "residual_multiplier": 0.3,
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "logits_scaling": 4.0,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
GROUPED = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 16,
    "n_group": 3,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
}
