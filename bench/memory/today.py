"""Configs of this year's families for :mod:`.plan`, at widths where the propagation outweighs the rest.

Each has what the planner has to know of it: recurrences, keys that are values, values of an earlier layer, several
residual streams, selected keys, states that decay by channel, recurrences without attention beside them.
"""

from __future__ import annotations

from typing import Any

_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 512}
_LATENT = {"kv_lora_rank": 128, "q_lora_rank": 128, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 64}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_EMBEDDED = {"hidden_size_per_layer_input": 64, "vocab_size_per_layer_input": 64}
_GEMMA = {"head_dim": 64, "sliding_window": 64}

# model_type -> what its config has beyond the common widths
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    },
    "mamba2": {"num_heads": 32, "head_dim": 64, "n_groups": 1, "state_size": 64, "expand": 2},
    "falcon_h1": {
        "mamba_d_ssm": 1024,
        "mamba_n_heads": 16,
        "mamba_d_head": 64,
        "mamba_n_groups": 1,
        "mamba_d_state": 64,
    },
    "gemma4_text": {
        **_GEMMA,
        **_EMBEDDED,
        "global_head_dim": 64,
        "num_kv_shared_layers": 1,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    },
    "gemma3n_text": {
        **_GEMMA,
        **_EMBEDDED,
        "laurel_rank": 32,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.9, 0.0, 0.0],
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "deepseek_v4": {
        **_EXPERTS,
        "head_dim": 64,
        "qk_rope_head_dim": 32,
        "q_lora_rank": 128,
        "o_groups": 2,
        "o_lora_rank": 128,
        "n_routed_experts": 4,
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
        "sliding_window": 64,
        "index_topk": 16,
        "index_n_heads": 4,
        "index_head_dim": 64,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 3,
    },
    "deepseek_v32": {
        **_LATENT,
        **_EXPERTS,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "index_topk": 64,
        "index_n_heads": 4,
        "index_head_dim": 64,
    },
    "qwen4_exp_text": {
        **_EXPERTS,
        "num_experts": 4,
        "shared_expert_intermediate_size": 512,
        "head_dim": 64,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 64,
        "indexer_budget": 64,
        "indexer_compress_ratio": 16,
        "ple_layer_ids": [1, 3],
        "ngram_vocab_size_base": 1000,
        "eos_token_id": 1,
    },
    # states that decay by channel, a softmax beside recurrences, layers of one branch each
    "kimi_linear": {
        **_LATENT,
        **_EXPERTS,
        "pad_token_id": 0,
        "linear_head_dim": 128,
        "linear_num_heads": 8,
        "num_local_experts": 4,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "nemotron_h": {
        "mamba_num_heads": 32,
        "mamba_head_dim": 64,
        "n_groups": 1,
        "ssm_state_size": 64,
        "layers_block_type": ["linear_attention", "full_attention", "mlp"],
    },
    "jamba": {
        "mamba_d_state": 16,
        "mamba_dt_rank": 64,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "num_experts": 1,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention", "recurrent"], "attention_window_size": 64},
    "xlstm": {"num_heads": 4, "chunk_size": 64},
    "rwkv": {"attention_hidden_size": 1024, "context_length": 8192},
    "zamba2": {
        "mamba_d_state": 64,
        "mamba_headdim": 64,
        "n_mamba_heads": 32,
        "mamba_ngroups": 1,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
        "num_mem_blocks": 1,
        "use_conv_bias": True,
    },
    "inkling_text": {
        "head_dim": 64,
        "swa_num_attention_heads": 16,
        "swa_num_key_value_heads": 16,
        "swa_head_dim": 64,
        "sliding_window_size": 64,
        "d_rel": 16,
        "rel_extent": 64,
        "layer_types": ["hybrid", "hybrid_sliding", "hybrid"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "moe_intermediate_size": 512,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
    },
}
