"""Variants of families with several mixed streams, for :mod:`.family_models`."""

from __future__ import annotations

from typing import Any

from tests.support.family_shapes import GROUPED, LATENT, SHAPE

_ZAMBA2 = {
    "mamba_d_state": 6,
    "n_mamba_heads": 8,
    "mamba_ngroups": 2,
    "chunk_size": 4,
    "adapter_rank": 3,
    "num_key_value_heads": 2,
    "layers_block_type": ["hybrid", "linear_attention", "hybrid"],
}
_STREAMS = {"hc_mult": 2, "hc_sinkhorn_iters": 3}

_GATED = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 12,
    "hc_count": 2,
    "hc_lowrank": 5,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 2,
    "indexer_compress_ratio": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    "eos_token_id": 1,
}
_NGRAMS = {
    "ple_layer_ids": [1, 3],
    "ple_embed_dim": 16,
    "ngram_size": 3,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 40,
    "make_ngram_vocab_size_divisible_by": 8,
    "ple_conv_kernel_size": 2,
}

STREAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v4": (
        "deepseek_v4",
        {
            **_STREAMS,
            "head_dim": 8,
            "qk_rope_head_dim": 4,
            "q_lora_rank": 12,
            "o_groups": 2,
            "o_lora_rank": 6,
            "n_routed_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "intermediate_size": 16,
            "swiglu_limit": 0.7,
            "mlp_layer_types": ["hash_moe", "moe", "moe"],
            "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
            "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 3},
            "sliding_window": 3,
            "index_topk": 1,
            "index_n_heads": 2,
            "index_head_dim": 6,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "attention_factor": 1.2,
            },
        },
    ),
    "zamba2": ("zamba2", {**_ZAMBA2, "num_mem_blocks": 2, "use_mem_rope": True}),
    "zamba2: adapters of attention, biases": (
        "zamba2",
        {
            **_ZAMBA2,
            "num_key_value_heads": None,
            "use_shared_attention_adapter": True,
            "add_bias_linear": True,
            "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        },
    ),
    "zamba": (
        "zamba",
        {
            "mamba_d_state": 5,
            "mamba_dt_rank": 3,
            "n_mamba_heads": 2,
            "num_key_value_heads": 2,
            "layers_block_type": ["hybrid", "linear_attention", "hybrid"],
        },
    ),
    "hy_v4": (
        "hy_v4",
        {
            **LATENT,
            **GROUPED,
            **_STREAMS,
            "index_topk": 3,
            "index_n_heads": 2,
            "index_head_dim": 6,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "indexer_types": ["full", "shared", "full"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "swiglu_limit": 0.7,
        },
    ),
    "qwen4_exp_text": (
        "qwen4_exp_text",
        {**_GATED, **_NGRAMS, "num_key_value_heads": 2, "output_gate_type": "sigmoid"},
    ),
    "qwen4_exp": (
        "qwen4_exp",
        {
            "text_config": {**SHAPE, **_GATED, "num_key_value_heads": 4, "hc_count": 3},
            "vision_config": {
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": 32,
            },
        },
    ),
}
