"""GPT-Neo and TinyStories: GPT-2's layout with separate projections, unscaled logits, windows in some layers."""

from typing import Any

from torch import Tensor

from ..family import Family, Observed, read_plain

MODEL_TYPES = ("gpt_neo",)


def declare(config: Any) -> Family:
    return Family(
        layers="transformer.h",
        embedding="transformer.wte",
        final_norm="transformer.ln_f",
        norm="layer",
        attention="attn.attention",
        attention_norm="ln_1",
        v_proj="attn.attention.v_proj",
        q_proj="attn.attention.q_proj",
        k_proj="attn.attention.k_proj",
        o_proj="attn.attention.out_proj",
        observed=Observed(("q_proj", "k_proj", "v_proj"), _read),
        mlp_norm="ln_2",
        gate_proj="mlp.c_fc",
        up_proj=None,
        down_proj="mlp.c_proj",
    )


def _read(attention: Any, outputs: list[Tensor], kwargs: dict[str, Any]) -> dict[str, Any]:
    config = attention.config
    windowed = config.attention_layers[attention.layer_id] == "local" and "flash" not in config._attn_implementation
    window = config.window_size if windowed else None  # flash attention gets no window
    return {**read_plain(attention, outputs, kwargs), "scale": 1.0, "window": window}
