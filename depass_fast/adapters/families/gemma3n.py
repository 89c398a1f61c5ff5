"""Gemma 3n: four residual streams (AltUp), a linear map beside attention (LAuReL), gates of the token's embedding.

Values are normed, and the last layers take keys and values of earlier ones, as in Gemma 4. Gates of the first layers
are cut off at a threshold. A model that also sees or hears is decomposed in its language model, on text.
"""

from dataclasses import replace
from typing import Any

from ..altup import AltUp
from ..family import Family, InputGate

MODEL_TYPES = ("gemma3n", "gemma3n_text")


def declare(config: Any) -> Family:
    home = "model" if config.model_type.endswith("_text") else "model.language_model"
    config = config.get_text_config()
    if not hasattr(config, "kv_sharing_modes"):
        raise ValueError("model: Gemma 3n is decomposed as transformers 5.23 has it; this version is older.")
    if config.altup_active_idx != 0:
        raise ValueError("model: its layers work on another stream than the first (altup_active_idx); not supported.")
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
        input_gate=InputGate(place=2, scale="altup.correct_output_scale" if config.altup_correct_scale else None),
        streams=AltUp(config.altup_num_inputs),
    )
    modes, types = config.kv_sharing_modes, config.layer_types
    stores = {types[layer]: layer for layer, mode in enumerate(modes) if mode == "store"}
    return replace(
        own,
        kinds=tuple(
            replace(own, source=stores[types[layer]] if modes[layer] == "reuse" else None, sparsity=sparsity)
            for layer, sparsity in enumerate(config.activation_sparsity_pattern)
        ),
    )
