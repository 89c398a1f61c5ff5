"""Variants of Gemma 3n and 4 for :mod:`.family_models`: shared values, gates of the token's embedding, streams."""

from __future__ import annotations

from typing import Any

from .family_shapes import SHAPE

_GQA = {"num_key_value_heads": 2}
_MHA = {"num_key_value_heads": 4}
_THREE = {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "sliding_window": 3}
_FOUR = {
    "num_hidden_layers": 5,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"],
    "sliding_window": 3,
}
_WIDTHS = {"head_dim": 8, "global_head_dim": 12, "vocab_size_per_layer_input": 64}
_EMBEDDED = {**_WIDTHS, "hidden_size_per_layer_input": 6}
_PLAIN = {**_WIDTHS, "hidden_size_per_layer_input": 0}
_UNIFIED = {"head_dim": 8, "global_head_dim": 12}
_EXPERTS = {"enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 16}
_KEYS = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}

_STREAMS = {
    "head_dim": 8,
    "hidden_size_per_layer_input": 6,
    "vocab_size_per_layer_input": 64,
    "laurel_rank": 5,
    "activation_sparsity_pattern": [0.7, 0.0, 0.0],
    "num_kv_shared_layers": 0,
}

# name -> (model_type, what differs from the shape of the others)
GEMMAS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3n_text": (
        "gemma3n_text",
        {
            **_GQA,
            **_STREAMS,
            **_FOUR,
            "activation_sparsity_pattern": [0.7, 0.6, 0.0, 0.0, 0.0],
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3n_text: MHA, biases, three streams": (
        "gemma3n_text",
        {**_MHA, **_STREAMS, **_THREE, "attention_bias": True, "altup_num_inputs": 3, "altup_correct_scale": False},
    ),
    "gemma4_text: shared values, embeddings": (
        "gemma4_text",
        {**_GQA, **_EMBEDDED, **_FOUR, "use_double_wide_mlp": True, "final_logit_softcapping": 3.0},
    ),
    "gemma4_text: MHA, biases": ("gemma4_text", {**_MHA, **_EMBEDDED, **_THREE, "attention_bias": True}),
    "gemma4_text: keys are values": ("gemma4_text", {**_GQA, **_PLAIN, **_KEYS, **_THREE}),
    "gemma4_text: experts": ("gemma4_text", {**_GQA, **_PLAIN, **_KEYS, **_THREE, **_EXPERTS}),
    "gemma4_text: experts, embeddings, shared values": (
        "gemma4_text",
        {**_GQA, **_EMBEDDED, **_THREE, **_EXPERTS, "num_kv_shared_layers": 1},
    ),
    "gemma4": (
        "gemma4",
        {
            "text_config": {**SHAPE, **_GQA, **_EMBEDDED, **_THREE, "num_kv_shared_layers": 1},
            "vision_config": None,
            "audio_config": None,
        },
    ),
    "gemma4_unified_text": ("gemma4_unified_text", {**_GQA, **_KEYS, **_UNIFIED, **_THREE}),
    "gemma4_unified": (
        "gemma4_unified",
        {
            "text_config": {**SHAPE, **_GQA, **_KEYS, **_UNIFIED, **_THREE, "final_logit_softcapping": 3.0},
            "vision_config": None,
            "audio_config": None,
        },
    ),
}
