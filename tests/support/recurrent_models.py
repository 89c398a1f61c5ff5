"""Variants of models whose layers are not softmax attention and an MLP alone, for :mod:`.family_models`."""

from __future__ import annotations

from typing import Any

from .family_shapes import SHAPE
from .hybrid_models import ALONE, HYBRIDS
from .newer_variants import NEWER_MIXERS
from .streamed_models import STREAMED

_GQA = {"num_key_value_heads": 2}
_MHA = {"num_key_value_heads": 4}
_DELTA = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
_EXPERTS = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
}
_SSD = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 6,
    "mamba_expand": 2,
}
_BAMBA = {**_SSD, "attn_layer_indices": [1]}
_GRANITE = {
    **_SSD,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "shared_intermediate_size": 40,
    "residual_multiplier": 0.3,
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.2,
    "logits_scaling": 4.0,
}
_NEMOTRON = {
    "head_dim": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 6,
    "num_hidden_layers": 4,
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp"],
}
_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
# num_heads · head_dim = expand · hidden_size
_MAMBA2 = {"state_size": 6, "num_heads": 8, "head_dim": 8, "n_groups": 2, "expand": 2, "residual_in_fp32": False}

# name -> (model_type, what differs from the shape of the others)
RECURRENT: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": ("qwen3_next", {**_GQA, **_DELTA, **_EXPERTS}),
    "qwen3_next: MHA, one MLP": ("qwen3_next", {**_MHA, **_DELTA, **_EXPERTS, "mlp_only_layers": [1]}),
    "qwen3_5_text": ("qwen3_5_text", {**_GQA, **_DELTA}),
    "qwen3_5_text: MHA, biases": ("qwen3_5_text", {**_MHA, **_DELTA, "attention_bias": True}),
    "qwen3_5_moe_text": ("qwen3_5_moe_text", {**_GQA, **_DELTA, **_EXPERTS}),
    "mamba2": ("mamba2", _MAMBA2),
    "mamba2: biases": ("mamba2", {**_MAMBA2, "use_bias": True, "n_groups": 1}),
    "bamba": ("bamba", {**_GQA, **_BAMBA}),
    "bamba: MHA, biases": ("bamba", {**_MHA, **_BAMBA, "mamba_proj_bias": True, "attention_bias": True}),
    "granitemoehybrid: state spaces": ("granitemoehybrid", {**_GQA, **_GRANITE, "num_local_experts": 0}),
    "granitemoehybrid: experts": (
        "granitemoehybrid",
        {**_MHA, **_GRANITE, "num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 16},
    ),
    "nemotron_h": ("nemotron_h", {**_GQA, **_NEMOTRON}),
    "nemotron_h: MHA, biases": (
        "nemotron_h",
        {**_MHA, **_NEMOTRON, "attention_bias": True, "mlp_bias": True, "use_bias": True},
    ),
    "qwen3_5": ("qwen3_5", {"text_config": {**SHAPE, **_GQA, **_DELTA}, "vision_config": _VISION}),
    "qwen3_5_moe": ("qwen3_5_moe", {"text_config": {**SHAPE, **_MHA, **_DELTA, **_EXPERTS}, "vision_config": _VISION}),
    **NEWER_MIXERS,
    **HYBRIDS,
    **ALONE,
    **STREAMED,
}
