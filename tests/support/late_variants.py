"""Variants of families that came to transformers late, and of models whose text model stands beside other parts."""

from __future__ import annotations

from typing import Any

from tests.support.family_shapes import EXPERTS, GQA, GROUPED, LATENT, LOCAL, MHA, MULTIPLIERS, SHAPE, SIGMOID, VISION

_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
_SENSES = {
    "vision_config": {**VISION, "crop_size": 14},
    "audio_config": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_blocks": 1,
        "num_attention_heads": 2,
        "ext_pw_out_channel": 16,
        "nemo_conv_channels": 16,
    },
}
_SPEECH = {
    "audio_encoder_config": {"model_type": "mimi", "hidden_size": 16, "num_filters": 4, "num_hidden_layers": 1},
    "depth_decoder_config": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16},
}
_DBRX = {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 4}

# transformers 4 knows these families, and has other code for them
OF_TRANSFORMERS_5 = ("aria_text", "dbrx", "emu3", "llama4", "llama4_text", "mllama", "moshi")

LATE_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "granitemoe_swa": (
        "granitemoe_swa",
        {**GQA, **MULTIPLIERS, **LOCAL, "num_local_experts": 4, "shared_intermediate_size": 24},
    ),
    "granitemoe_swa: nothing shared, biases": (
        "granitemoe_swa",
        {**MHA, **MULTIPLIERS, **LOCAL, "num_local_experts": 4, "attention_bias": True},
    ),
    "cohere_compass_text": (
        "cohere_compass_text",
        {
            **GQA,
            **LOCAL,
            "head_dim": 8,
            "logit_scale": 0.2,
            "rope_parameters": {"full_attention": None, "sliding_attention": _ROPE},
        },
    ),
    "cohere_compass_text: unscaled, no window": (
        "cohere_compass_text",
        {**MHA, "head_dim": 8, "attention_bias": True, "rope_parameters": {"full_attention": _ROPE}},
    ),
    "aria_text": ("aria_text", {**GQA, "head_dim": 8, "moe_num_experts": 6, "intermediate_size": 16}),
    "axk1": ("axk1", {**LATENT, **GROUPED}),
    "axk1: no pairs, not normalised": (
        "axk1",
        {**LATENT, **GROUPED, "rope_interleave": False, "norm_topk_prob": False},
    ),
    "mimo_v2_flash": (
        "mimo_v2_flash",
        {
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            **LOCAL,
            **SIGMOID,
            "head_dim": 12,
            "v_head_dim": 8,
            "mlp_layer_types": ["dense", "sparse", "sparse"],
        },
    ),
    "mimo_v2_flash: unscaled, biases": (
        "mimo_v2_flash",
        {
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            **LOCAL,
            **SIGMOID,
            "head_dim": 8,
            "v_head_dim": 8,
            "attention_value_scale": None,
            "attention_bias": True,
        },
    ),
    "flint": (
        "flint",
        {**GQA, **EXPERTS, **LOCAL, "head_dim": 16, "shared_expert_intermediate_size": 24, "mlp_only_layers": [1]},
    ),
    "emu3": (
        "emu3",
        {
            "text_config": {**SHAPE, **GQA, "pad_token_id": 0},
            "vq_config": {
                "base_channels": 32,
                "channel_multiplier": [1],
                "num_res_blocks": 1,
                "attn_resolutions": [],
                "hidden_size": 8,
                "num_attention_heads": 1,
            },
        },
    ),
    "mllama": (
        "mllama",
        {
            "text_config": {
                **{**SHAPE, "num_hidden_layers": 5},
                **GQA,
                "cross_attention_layers": [1, 4],
                "pad_token_id": 0,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            },
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_global_layers": 1,
                "attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
                "supported_aspect_ratios": [[1, 1]],
                "intermediate_layers_indices": [0],
                "vision_output_dim": 32,
            },
        },
    ),
    "fuyu": ("fuyu", {"text_config": {"model_type": "persimmon", **SHAPE}, "patch_size": 4}),
    "got_ocr2": (
        "got_ocr2",
        {
            "text_config": {"model_type": "qwen2", **SHAPE, **GQA},
            "vision_config": {**VISION, "output_channels": 8, "mlp_dim": 16, "global_attn_indexes": []},
        },
    ),
    "moss_transcribe_diarize": (
        "moss_transcribe_diarize",
        {
            "text_config": {"model_type": "qwen3", **SHAPE, **GQA, "head_dim": 16},
            "audio_config": {
                "d_model": 16,
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 16,
            },
        },
    ),
    "phi4_multimodal": ("phi4_multimodal", {**GQA, **_SENSES, "pad_token_id": 0, "partial_rotary_factor": 0.5}),
    "phi4_multimodal: window": ("phi4_multimodal", {**MHA, **_SENSES, "pad_token_id": 0, "sliding_window": 3}),
    "dbrx": (
        "dbrx",
        {
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 0.7, "rope_theta": 1e4},
            "ffn_config": {**_DBRX, "moe_top_k": 2},
        },
    ),
    "dbrx: MHA, top-1, weights as they are": (
        "dbrx",
        {
            "attn_config": {"kv_n_heads": 4, "clip_qkv": 0.7, "rope_theta": 1e4},
            "ffn_config": {**_DBRX, "moe_top_k": 1, "moe_normalize_expert_weights": None},
        },
    ),
    "git": ("git", {"vision_config": VISION}),
    "modernbert-decoder: biases": (
        "modernbert-decoder",
        {
            "pad_token_id": 0,
            "local_attention": 6,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            **{f"{part}_bias": True for part in ("attention", "mlp", "norm", "classifier", "decoder")},
        },
    ),
    "moshi": ("moshi", {**GQA, **_SPEECH, "ffn_dim": 48, "head_dim": 8}),
}
