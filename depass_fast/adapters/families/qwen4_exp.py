"""Qwen 4 (experimental): Qwen 3.5's layers in gated streams, keys selected in blocks, embeddings of several tokens.

A model that also sees is decomposed in its language model.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers.activations import ACT2FN

from ..family import Family, HeadScale
from ..gated_streams import GatedStreams
from ..recurrent import gated_head_norm
from . import qwen3_5

MODEL_TYPES = ("qwen4_exp_text", "qwen4_exp")


def declare(config: Any) -> Family:
    home = "model.language_model" if config.model_type == "qwen4_exp" else "model"
    config = config.get_text_config()
    gate = ACT2FN[config.output_gate_type or config.hidden_act]

    def scale(mixer: Any, outputs: list[Tensor], heads: Tensor) -> Tensor:
        return gated_head_norm(mixer.norm, outputs[0], heads, gate)

    def streamed(family: Family) -> Family:
        own = {"head_scale": HeadScale(("in_proj_z",), scale)} if family.mixer is not None else selection
        return replace(
            family,
            decoder=home,
            layers=f"{home}.layers",
            embedding=f"{home}.embed_tokens",
            final_norm=None,
            attention_norm=None,
            mlp_norm=None,
            streams=GatedStreams(config.hc_count, config.hidden_size),
            counts_positions=bool(config.ple_layer_ids),  # a prompt's first tokens have none before them
            **own,
        )

    selection = {}
    if config.indexer_budget is not None:  # whole blocks, and what is behind the last of them
        selection = {"selects": config.indexer_budget + config.indexer_compress_ratio - 1, "selects_by_mask": True}
    family = qwen3_5.declare(config)
    assert family.kinds is not None
    return replace(streamed(family), kinds=tuple(map(streamed, family.kinds)))
