"""XGLM and BioGPT: OPT's layers behind a scaled embedding, with sinusoidal or learned positions."""

from typing import Any

from ..family import Family, Observed, read_plain

MODEL_TYPES = ("xglm", "biogpt")


def declare(config: Any) -> Family:
    if getattr(config, "add_cross_attention", False):
        raise ValueError("model: with cross-attention it reads more than its own residual stream; not supported.")
    home, unembedding = ("biogpt", "output_projection") if config.model_type == "biogpt" else ("model", "lm_head")
    return Family(
        layers=f"{home}.layers",
        embedding=f"{home}.embed_tokens",
        final_norm=f"{home}.layer_norm",
        unembedding=unembedding,
        norm="layer",
        attention_norm="self_attn_layer_norm",
        o_proj="self_attn.out_proj",
        observed=Observed(("q_proj", "k_proj", "v_proj"), read_plain),
        mlp="fc1",
        mlp_norm="final_layer_norm",
        gate_proj="fc1",
        up_proj=None,
        down_proj="fc2",
    )
