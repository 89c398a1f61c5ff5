"""LFM3: LFM2's layers with more taps, norms behind both branches, windows, and a sigmoid that gates every head."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..family import Family, HeadScale
from . import lfm2

MODEL_TYPES = ("lfm3",)


def declare(config: Any) -> Family:
    norms: dict[str, Any] = {}
    if config.use_sandwich_norm:
        norms = {"attention_output_norm": "post_operator_norm", "mlp_output_norm": "post_ffn_norm"}
    gate = HeadScale(("g_proj",), _gate) if config.use_attention_gate else None

    def changed(kind: Family) -> Family:
        if kind.mixer is not None:
            return replace(kind, **norms)
        return replace(kind, o_proj="self_attn.o_proj", head_scale=gate, **norms)

    family = lfm2.declare(config)
    kinds = tuple(changed(kind) for kind in family.kinds or ())
    return replace(changed(family), kinds=kinds)


def _gate(attention: Any, outputs: list[Tensor], heads: Tensor) -> Tensor:
    return torch.sigmoid(outputs[0]).repeat_interleave(attention.head_dim, -1)
