"""Stands for the published module of this name."""

from depass_fast.compat.utils import (
    apply_rotary_pos_emb_llama,
    apply_rotary_pos_emb_qwen,
    capture_sdpa,
    compute_attention_weights_mha,
    from_states_to_probs,
    get_rmsnorm_scaling,
    get_stream_from_prompt,
    hook_manager,
    repeat_kv,
    rotate_half,
    scaled_dot_product_attention,
)

__all__ = [
    "apply_rotary_pos_emb_llama",
    "apply_rotary_pos_emb_qwen",
    "capture_sdpa",
    "compute_attention_weights_mha",
    "from_states_to_probs",
    "get_rmsnorm_scaling",
    "get_stream_from_prompt",
    "hook_manager",
    "repeat_kv",
    "rotate_half",
    "scaled_dot_product_attention",
]
