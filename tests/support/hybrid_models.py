"""Variants of families with recurrences, gated heads and short convolutions (see family_models.py).

Layer 1 has the attention, if any has: tests look at its heads.
"""

from __future__ import annotations

from typing import Any

_GQA = {"num_key_value_heads": 2}
_MHA = {"num_key_value_heads": 4}
_MIDDLE = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_SHORT = {"layer_types": ["conv", "full_attention", "conv"]}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_DELTA = {
    "pad_token_id": 0,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 8,
}
_JAMBA = {
    "mamba_d_state": 5,
    "mamba_dt_rank": 3,
    "attn_layer_period": 3,
    "attn_layer_offset": 1,
    "num_experts": 4,
}
_KIMI = {
    "pad_token_id": 0,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "linear_head_dim": 6,
    "linear_num_heads": 4,
    "num_experts_per_tok": 2,
    "num_local_experts": 6,
    "moe_intermediate_size": 16,
}

_DOTS = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 10,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "head_dim": 10,
    "v_head_dim": 8,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_group": 3,
    "topk_group": 2,
    "moe_intermediate_size": 16,
    "shared_experts_intermediate_size": 24,
    "pad_token_id": 0,
    "index_topk": 3,
    "index_n_heads": 2,
    "index_head_dim": 6,
    "layer_types": ["sliding_attention", "indexed_attention", "full_attention"],
    "sliding_window": 3,
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "swa_q_lora_rank": 12,
    "swa_kv_lora_rank": 6,
    "swa_head_dim": 8,
    "swa_qk_nope_head_dim": 4,
    "swa_v_head_dim": 6,
}

_XLSTM = {  # keys and values that are multiples of 64, as transformers' cache takes them for
    "hidden_size": 64,
    "num_heads": 4,
    "qk_dim_factor": 1.0,
    "v_dim_factor": 2.0,
    "ffn_proj_factor": 0.75,
    "ffn_round_up_to_multiple_of": 16,
    "chunk_size": 4,
}

HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "afmoe": (
        "afmoe",
        {
            **_GQA,
            **_EXPERTS,
            "head_dim": 16,
            "num_shared_experts": 2,
            "num_dense_layers": 1,
            "route_scale": 1.3,
            "mup_enabled": True,
            "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "afmoe: biases, dense": (
        "afmoe",
        {**_MHA, **_EXPERTS, "head_dim": 8, "num_dense_layers": 3, "attention_bias": True},
    ),
    "olmo_hybrid": ("olmo_hybrid", {**_GQA, **_DELTA, **_MIDDLE}),
    "olmo_hybrid: positive eigenvalues, biases": (
        "olmo_hybrid",
        {**_MHA, **_DELTA, **_MIDDLE, "linear_allow_neg_eigval": False, "attention_bias": True},
    ),
    "lfm2": ("lfm2", {**_GQA, **_SHORT, "block_multiple_of": 8}),
    "lfm2: biases": ("lfm2", {**_MHA, **_SHORT, "block_auto_adjust_ff_dim": False, "conv_bias": True}),
    "lfm2_moe": ("lfm2_moe", {**_GQA, **_SHORT, **_EXPERTS, "num_dense_layers": 1, "routed_scaling_factor": 1.4}),
    "lfm3": (
        "lfm3",
        {
            **_GQA,
            "head_dim": 12,
            "conv_L_cache": 3,
            "conv_bias": True,
            "attention_bias": True,
            "sliding_window": 3,
            "layer_types": ["conv", "full_attention", "sliding_attention"],
            "pad_token_id": 0,
        },
    ),
    "lfm3: neither norms nor gates behind a branch": (
        "lfm3",
        {
            **_MHA,
            **_SHORT,
            "head_dim": 8,
            "use_sandwich_norm": False,
            "use_attention_gate": False,
            "pad_token_id": 0,
        },
    ),
    "recurrent_gemma": (
        "recurrent_gemma",
        {
            **_GQA,
            "block_types": ["recurrent", "attention", "recurrent"],
            "attention_window_size": 3,
            "logits_soft_cap": 3.0,
            "attention_bias": True,
        },
    ),
    "jamba": ("jamba", {**_GQA, **_JAMBA, "expert_layer_period": 2, "expert_layer_offset": 1}),
    "jamba: biases, dense": (
        "jamba",
        {**_MHA, **_JAMBA, "num_experts": 1, "mamba_proj_bias": True},
    ),
    "dots3_note_text": ("dots3_note_text", _DOTS),
    "dots3_note_text: all selected": (
        "dots3_note_text",
        {**_DOTS, "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"]},
    ),
    "kimi_linear": ("kimi_linear", {**_MHA, **_KIMI, **_MIDDLE}),
    "kimi_linear: latent of queries": ("kimi_linear", {**_MHA, **_KIMI, **_MIDDLE, "q_lora_rank": 12}),
}

# no attention and no MLP in any layer: tests that take heads and neurons of fixed layers cannot take these
_MAMBA = {"state_size": 5, "expand": 2, "time_step_rank": 3, "residual_in_fp32": False}
ALONE: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba", _MAMBA),
    "mamba: biases": ("mamba", {**_MAMBA, "use_bias": True, "tie_word_embeddings": False}),
    "mamba: no biases": ("mamba", {**_MAMBA, "use_conv_bias": False}),
    "falcon_mamba": ("falcon_mamba", _MAMBA),
    "rwkv": ("rwkv", {"rescale_every": 2}),
    "xlstm": ("xlstm", _XLSTM),
    "xlstm: biases": ("xlstm", {**_XLSTM, "num_heads": 2, "qk_dim_factor": 2.0, "v_dim_factor": 1.0, "use_bias": True}),
}
