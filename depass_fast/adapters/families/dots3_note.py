"""dots 3: latent attention with a gate for every head; an indexer selects keys, or a window hides them.

Layers with a window have widths of their own. Latents are scaled behind their norms.
"""

from dataclasses import replace
from typing import Any

from ..family import Family, HeadScale
from . import deepseek

MODEL_TYPES = ("dots3_note_text",)


def declare(config: Any) -> Family:
    kinds = tuple(_layer(config, index) for index in range(config.num_hidden_layers))
    return replace(kinds[0], kinds=kinds)


def _layer(config: Any, index: int) -> Family:
    own = config.per_layer_config[index]
    gate = HeadScale(
        ("g_proj",), lambda attention, outputs, y: outputs[0].sigmoid().repeat_interleave(attention.v_head_dim, -1)
    )
    return replace(
        deepseek.declare(own),
        v_norm_factor=(config.hidden_size / own.kv_lora_rank) ** 0.5,
        head_scale=gate,
        selects=config.index_topk if config.layer_types[index] == "indexed_attention" else None,
    )
