"""Small random models of every supported family and of its variants, all norm weights and biases randomised."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from bench.core.models import randomised
from depass_fast.adapters import family_file
from depass_fast.adapters.recurrent import knows_recurrences
from tests.support.ahead_models import AHEAD
from tests.support.family_shapes import (
    BIASES,
    EXPERTS,
    GEMMA,
    GEMMA3,
    GQA,
    GROUPED,
    LATENT,
    LOCAL,
    LOCAL_ROPE,
    MHA,
    MULTIPLIERS,
    SHAPE,
    SIGMOID,
    VISION,
)
from tests.support.gemma_models import GEMMAS
from tests.support.late_variants import LATE_VARIANTS, OF_TRANSFORMERS_5
from tests.support.newer_variants import NEWER
from tests.support.recurrent_models import RECURRENT
from tests.support.sparse_models import SPARSE

# name -> (model_type, what differs from the shape above)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama: MHA": ("llama", MHA),
    "llama: GQA": ("llama", GQA),
    "llama: biases": ("llama", {**GQA, **BIASES}),
    "llama: wide heads, tied": ("llama", {**GQA, "head_dim": 12, "tie_word_embeddings": True}),
    "mistral: window": ("mistral", {**GQA, "sliding_window": 3}),
    "mistral: no window, narrow heads": ("mistral", {**GQA, "sliding_window": None, "head_dim": 6}),
    "qwen2": ("qwen2", GQA),
    "qwen2: window": ("qwen2", {**GQA, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0}),
    "qwen3": ("qwen3", {**GQA, "head_dim": 16}),
    "qwen3: MQA, biases": ("qwen3", {"num_key_value_heads": 1, "head_dim": 16, "attention_bias": True}),
    "smollm3": ("smollm3", {**GQA, "pad_token_id": 0, "no_rope_layers": [1, 0, 1]}),
    "gpt2": ("gpt2", {}),
    "gpt2: scaled by layer": (
        "gpt2",
        {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True, "n_inner": 40},
    ),
    "gpt2: unscaled": ("gpt2", {"scale_attn_weights": False, "activation_function": "relu"}),
    "gpt_neox: parallel": ("gpt_neox", {"rotary_pct": 0.5}),
    "gpt_neox: sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt_neox: no attention bias": ("gpt_neox", {"attention_bias": False, "rotary_pct": 1.0}),
    "gptj": ("gptj", {"rotary_dim": 4}),
    "gptj: all rotary": ("gptj", {"rotary_dim": 8, "n_inner": 40}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "opt: stream norms, projected embedding": (
        "opt",
        {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "opt: no biases": (
        "opt",
        {
            "ffn_dim": 48,
            "word_embed_proj_dim": 32,
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
            "activation_function": "gelu",
        },
    ),
    "phi": ("phi", {**GQA, "partial_rotary_factor": 0.5}),
    "phi: QK norms": ("phi", {**MHA, "qk_layernorm": True}),
    "phi3": ("phi3", {**GQA, "pad_token_id": 0}),
    "phi3: window": ("phi3", {**MHA, "pad_token_id": 0, "sliding_window": 3}),
    "phi3: LongRoPE, partial rotary, tied": (
        "phi3",
        {
            **GQA,
            "pad_token_id": 0,
            "partial_rotary_factor": 0.5,
            "original_max_position_embeddings": 6,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.2], "long_factor": [2.0, 5.0]},
            "tie_word_embeddings": True,
        },
    ),
    "gemma": ("gemma", {**GQA, "head_dim": 16}),
    "gemma: MQA": ("gemma", {"num_key_value_heads": 1, "head_dim": 16, "attention_bias": True}),
    "gemma2": ("gemma2", {**GEMMA, **LOCAL}),
    "gemma2: tight caps": ("gemma2", {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3_text": ("gemma3_text", {**GEMMA3, **LOCAL_ROPE}),
    "gemma3: with vision": ("gemma3", {"text_config": {**SHAPE, **GEMMA3}, "vision_config": VISION}),
    "mixtral": ("mixtral", {**GQA, "num_local_experts": 4}),
    "mixtral: top-1, window": (
        "mixtral",
        {**MHA, "num_local_experts": 4, "num_experts_per_tok": 1, "sliding_window": 3},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {**GQA, **EXPERTS, "shared_expert_intermediate_size": 24, "mlp_only_layers": [1], "decoder_sparse_step": 1},
    ),
    "qwen2_moe: window, normalised": (
        "qwen2_moe",
        {
            **MHA,
            **EXPERTS,
            "shared_expert_intermediate_size": 24,
            "norm_topk_prob": True,
            "use_sliding_window": True,
            "sliding_window": 3,
            "max_window_layers": 1,
        },
    ),
    "qwen3_moe": ("qwen3_moe", {**GQA, **EXPERTS, "head_dim": 16, "norm_topk_prob": True, "decoder_sparse_step": 1}),
    "qwen3_moe: every second layer": (
        "qwen3_moe",
        {**GQA, **EXPERTS, "head_dim": 16, "decoder_sparse_step": 2, "attention_bias": True},
    ),
    "olmo": ("olmo", GQA),
    "olmo: clamped": ("olmo", {**GQA, "clip_qkv": 0.7}),
    "olmo: clamped, biases": ("olmo", {**MHA, "clip_qkv": 0.7, "attention_bias": True}),
    "olmo2": ("olmo2", GQA),
    "olmo2: biases": ("olmo2", {**MHA, "attention_bias": True}),
    "granite": ("granite", {**GQA, **MULTIPLIERS}),
    "granite: biases": ("granite", {**GQA, **BIASES, "residual_multiplier": 0.3}),
    "cohere": ("cohere", {**GQA, "logit_scale": 0.2}),
    "cohere: QK norms": ("cohere", {**GQA, "use_qk_norm": True, "attention_bias": True}),
    "cohere2": (
        "cohere2",
        {**GQA, "logit_scale": 0.2, "head_dim": 8, "sliding_window_pattern": 2, **LOCAL},
    ),
    "falcon: 7B": ("falcon", {}),
    "falcon: 7B, biases": ("falcon", {"bias": True, "ffn_hidden_size": 40}),
    "falcon: 40B": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    "falcon: 11B": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon: RW, ALiBi": ("falcon", {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False}),
    "stablelm": ("stablelm", {**GQA, "use_qkv_bias": True}),
    "stablelm: parallel, QK norms": ("stablelm", {**GQA, "use_parallel_residual": True, "qk_layernorm": True}),
    "bloom": ("bloom", {}),
    "bloom: odd heads": ("bloom", {"hidden_size": 36, "n_head": 6}),
    "mpt": ("mpt", {}),
    "mpt: clamped, scaled": ("mpt", {"attn_config": {"clip_qkv": 0.7, "softmax_scale": 0.5}}),
    "mpt: odd heads": ("mpt", {"hidden_size": 36, "num_attention_heads": 6}),
    "gpt_bigcode: MQA": ("gpt_bigcode", {}),
    "gpt_bigcode: MHA": ("gpt_bigcode", {"multi_query": False, "n_inner": 40}),
    "nemotron": ("nemotron", {**GQA, "partial_rotary_factor": 0.5}),
    "nemotron: biases": ("nemotron", {**MHA, **BIASES}),
    "glm": ("glm", {**GQA, "head_dim": 8, "pad_token_id": 0}),
    "glm4": ("glm4", {**GQA, "head_dim": 8, "attention_bias": True, "pad_token_id": 0}),
    "olmo3": ("olmo3", {**GQA, **LOCAL}),
    "exaone4": ("exaone4", {**GQA, **LOCAL}),
    "exaone4: no window": ("exaone4", {**MHA, "sliding_window": None, "layer_types": ["full_attention"] * 3}),
    "ministral": ("ministral", {**GQA, **LOCAL, "head_dim": 8}),
    "seed_oss": ("seed_oss", {**GQA, "head_dim": 16, "attention_bias": True, "attention_out_bias": True}),
    "helium": ("helium", {**GQA, "head_dim": 8}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {**GQA, "head_dim": 16}),
    "apertus": ("apertus", {**GQA, "pad_token_id": 0}),
    "arcee": ("arcee", {**GQA, "mlp_bias": True}),
    "starcoder2: window": ("starcoder2", {**GQA, "sliding_window": 3}),
    "starcoder2: no biases": ("starcoder2", {**MHA, "use_bias": False, "sliding_window": None}),
    "olmoe": ("olmoe", {**GQA, **EXPERTS, "clip_qkv": 0.7}),
    "olmoe: normalised, no clamp": ("olmoe", {**MHA, **EXPERTS, "norm_topk_prob": True, "attention_bias": True}),
    "flex_olmo": ("flex_olmo", {**GQA, **EXPERTS, "pad_token_id": 0}),
    "gpt_oss": (
        "gpt_oss",
        {**GQA, **LOCAL, "head_dim": 16, "num_local_experts": 6, "num_experts_per_tok": 2, "swiglu_limit": 0.7},
    ),
    "glm4_moe": ("glm4_moe", {**GQA, **SIGMOID, "head_dim": 16, "use_qk_norm": True, "attention_bias": True}),
    "dots1": ("dots1", {**GQA, **SIGMOID, **LOCAL, "attention_bias": True}),
    "granitemoe": ("granitemoe", {**GQA, **MULTIPLIERS, "num_local_experts": 4}),
    "granitemoeshared": (
        "granitemoeshared",
        {**GQA, **MULTIPLIERS, "num_local_experts": 4, "shared_intermediate_size": 24, "attention_bias": True},
    ),
    "phimoe": ("phimoe", {**GQA, "num_local_experts": 4, "attention_bias": True, "lm_head_bias": True}),
    "phimoe: window": ("phimoe", {**GQA, "num_local_experts": 4, "sliding_window": 3}),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {**GQA, "moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 1},
    ),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {**GQA, "head_dim": 16, "num_experts": 4, "moe_topk": [2, 2, 2]}),
    "minimax_m2": (
        "minimax_m2",
        {**GQA, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 8},
    ),
    "exaone_moe": ("exaone_moe", {**GQA, **SIGMOID, **LOCAL}),
    "solar_open": ("solar_open", {**GQA, **SIGMOID, "head_dim": 16}),
    "cohere2_moe": ("cohere2_moe", {**GQA, **LOCAL, "head_dim": 8, "num_experts": 4, "logit_scale": 0.2}),
    "cohere2_moe: sigmoid, shared, RMSNorm": (
        "cohere2_moe",
        {
            **GQA,
            **LOCAL,
            "head_dim": 8,
            "num_experts": 4,
            "expert_selection_fn": "sigmoid",
            "num_shared_experts": 2,
            "first_k_dense_replace": 1,
            "prefix_dense_intermediate_size": 40,
            "rms_norm_eps": 1e-5,
        },
    ),
    "hy_v3": ("hy_v3", {**GQA, **EXPERTS, "head_dim": 16, "num_shared_experts": 2, "enable_moe_fp32_combine": False}),
    "kolibri1": ("kolibri1", {**GQA, **EXPERTS, **LOCAL, "shared_expert_intermediate_size": 24}),
    "mellum": ("mellum", {**GQA, **EXPERTS, **LOCAL, "mlp_layer_types": ["sparse", "dense", "sparse"]}),
    "deepseek_v2": (
        "deepseek_v2",
        {**LATENT, **GROUPED, "q_lora_rank": None, "topk_method": "group_limited_greedy"},
    ),
    "deepseek_v2: greedy": ("deepseek_v2", {**LATENT, **GROUPED, "topk_method": "greedy"}),
    "deepseek_v3": ("deepseek_v3", {**LATENT, **GROUPED}),
    "deepseek_v3: no pairs, not normalised": (
        "deepseek_v3",
        {**LATENT, **GROUPED, "rope_interleave": False, "norm_topk_prob": False},
    ),
    "glm4_moe_lite": ("glm4_moe_lite", {**LATENT, **GROUPED}),
    "youtu": ("youtu", {**LATENT, "q_lora_rank": None}),
    "minicpm3": ("minicpm3", {**LATENT, "scale_depth": 1.4, "scale_emb": 2, "dim_model_base": 8}),
    "gpt_neo": ("gpt_neo", {"attention_types": [[["global"], 1], [["local"], 2]], "window_size": 3}),
    "codegen": ("codegen", {"hidden_size": 64, "num_attention_heads": 8, "rotary_dim": 4}),
    "ministral3": (
        "ministral3",
        {
            **GQA,
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 16.0,
                "original_max_position_embeddings": 4,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.5,
            },
        },
    ),
    "ministral3: window": ("ministral3", {**GQA, "head_dim": 8, "sliding_window": 3}),
    "cwm": ("cwm", {**GQA, **LOCAL, "head_dim": 16}),
    "ernie4_5": ("ernie4_5", {**GQA, "head_dim": 16}),
    "ernie4_5: biases": ("ernie4_5", {**MHA, "use_bias": True, "tie_word_embeddings": False}),
    "vaultgemma": ("vaultgemma", {**GEMMA, **LOCAL, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "vaultgemma: no caps, biases": (
        "vaultgemma",
        {**GEMMA, "attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True},
    ),
    "persimmon": ("persimmon", {}),
    "persimmon: no QK norms": ("persimmon", {"qk_layernorm": False, "partial_rotary_factor": 0.25}),
    "nanochat": ("nanochat", {"final_logit_softcapping": 3.0}),
    "nanochat: GQA, biases, no cap": (
        "nanochat",
        {**GQA, "attention_bias": True, "final_logit_softcapping": None},
    ),
    "xglm": ("xglm", {"ffn_dim": 48, "init_std": 0.2}),
    "xglm: unscaled embedding": ("xglm", {"ffn_dim": 48, "init_std": 0.2, "scale_embedding": False}),
    "biogpt": ("biogpt", {}),
    "jais2": ("jais2", MHA),
    "jais2: GQA, no biases": ("jais2", {**GQA, "attention_bias": False, "mlp_bias": False}),
    "openai-gpt": ("openai-gpt", {}),
    "ctrl": ("ctrl", {"dff": 48}),
    "internlm3": ("internlm3", {**GQA, "qkv_bias": True, "bias": True}),
    "iquestcoder": ("iquestcoder", {**GQA, "head_dim": 16}),
    "hyperclovax": ("hyperclovax", {**GQA, **MULTIPLIERS, "logits_scaling": 0.3}),
    "hyperclovax: no output norms": ("hyperclovax", {**MHA, "use_post_norm": False, "attention_bias": True}),
    "gpt_neox_japanese": ("gpt_neox_japanese", {"rotary_pct": 0.5, "intermediate_multiple_size": 2}),
    "granite_swa": ("granite_swa", {**GQA, **MULTIPLIERS, **LOCAL}),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            **GQA,
            **MULTIPLIERS,
            "num_local_experts": 0,
            "shared_intermediate_size": 48,
            "layer_types": ["attention"] * 3,
            "position_embedding_type": "rope",
            "mamba_n_heads": 4,
        },
    ),
    **LATE_VARIANTS,
    **SPARSE,
    **NEWER,
    **RECURRENT,
    **GEMMAS,
    **AHEAD,
}
_NAMES = {
    "mpt": {"max_position_embeddings": "max_seq_len"},
    "dbrx": {"hidden_size": "d_model"},
    "gpt_neo": {"num_hidden_layers": "num_layers"},
}
FIRST = frozenset({family: name for name, (family, _) in reversed(VARIANTS.items())}.values())  # of each family


def available(name: str) -> bool:
    """True if the installed transformers knows this variant's family by the code that is supported."""
    model_type, version = VARIANTS[name][0], tuple(map(int, transformers.__version__.split(".")[:2]))
    known = model_type in CONFIG_MAPPING and (version >= (5,) or model_type not in OF_TRANSFORMERS_5)
    known = known and (version >= (5, 23) or not model_type.startswith("gemma3n"))
    return known and (name not in {*RECURRENT, *GEMMAS, *AHEAD} or knows_recurrences())


# of each file of declarations, which holds families of one layout: the first that the installed transformers has
FIRST_OF_FILE = frozenset(
    {family_file(family): name for name, (family, _) in reversed(VARIANTS.items()) if available(name)}.values()
)


def build_variant(
    name: str, seed: int = 0, implementation: str | None = None, regroup: bool = False
) -> torch.nn.Module:
    """A random model of a variant, in float32 and eval mode; ``implementation`` is that of its attention.

    ``regroup``: with as many KV heads as heads where the variant has fewer, and the other way round; all that come
    from a latent are different.
    """
    model_type, changes = VARIANTS[name]
    return build_model(model_type, seed, implementation, **(_regrouped(changes) if regroup else changes))


def _regrouped(changes: dict[str, Any]) -> dict[str, Any]:
    changes = {key: _regrouped(value) if isinstance(value, dict) else value for key, value in changes.items()}
    for key in (
        {"num_key_value_heads", "num_kv_heads", "kv_n_heads", "index_n_heads"} & changes.keys()
        if "kv_lora_rank" not in changes
        else ()
    ):
        changes[key] = 2 if changes[key] == SHAPE["num_attention_heads"] else SHAPE["num_attention_heads"]
    return changes


def build_model(model_type: str, seed: int = 0, implementation: str | None = None, **changes: Any) -> torch.nn.Module:
    """A random model of a family in the small shape, with some of its config changed."""
    names = _NAMES.get(model_type, {})
    shape = {names.get(key, key): value for key, value in {**SHAPE, **changes}.items()}
    config = AutoConfig.for_model(model_type, **shape)
    torch.manual_seed(seed)
    attention = {} if implementation is None else {"attn_implementation": implementation}
    return randomised(AutoModelForCausalLM.from_config(config, **attention).eval())
