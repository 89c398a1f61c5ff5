"""Gemma 4, dense and mixtures of experts: norms of values, shared keys and values, a gate of the token's embedding.

Layers are local or global, with heads of other widths; a global one may take its keys for values. Later layers may take
the keys and values of the last one of their kind that has its own. A model that also sees or hears is decomposed in its
language model, on text.
"""

from dataclasses import replace
from typing import Any

from ..family import Beside, Experts, Family, InputGate

MODEL_TYPES = ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")


def declare(config: Any) -> Family:
    home = "model" if config.model_type.endswith("_text") else "model.language_model"
    config = config.get_text_config()
    if config.use_bidirectional_attention == "all":
        raise ValueError("model: its attention looks ahead, by its config; only causal models are decomposed.")
    norms = Beside("pre_feedforward_layernorm_2", "post_feedforward_layernorm_2", "post_feedforward_layernorm_1")
    mixture = None
    if getattr(config, "enable_moe_block", False):
        mixture = Experts(config.top_k_experts, router="router", experts="experts", beside=norms)
    own = Family(
        decoder=home,
        layers=f"{home}.layers",
        embedding=f"{home}.embed_tokens",
        final_norm=f"{home}.norm",
        logit_cap=config.final_logit_softcapping,
        layer_windows=True,
        attention_output_norm="post_attention_layernorm",
        v_head_norm="self_attn.v_norm",
        mlp_norm="pre_feedforward_layernorm",
        mlp_output_norm="post_feedforward_layernorm",
        experts=mixture,
        input_gate=InputGate() if getattr(config, "hidden_size_per_layer_input", None) else None,
        layer_factor="layer_scalar",
    )
    modes, types = config.kv_sharing_modes, config.layer_types
    stores = {types[layer]: layer for layer, mode in enumerate(modes) if mode == "store"}
    keys = replace(own, v_proj="self_attn.k_proj") if config.attention_k_eq_v else own
    kinds = [own if kind == "sliding_attention" else keys for kind in types]
    return replace(
        own,
        kinds=tuple(
            replace(kind, source=stores[types[layer]]) if modes[layer] == "reuse" else kind
            for layer, kind in enumerate(kinds)
        ),
    )
