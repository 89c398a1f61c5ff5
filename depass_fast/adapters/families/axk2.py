"""A.X K2: DeepSeek 3.2 with a gate of the heads, and with a gate by channel behind most norms of the residual stream.

The gate of a norm's output y is sigmoid(fc2(silu(fc1(y)))), frozen like the norm's scale.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from ..family import Family, HeadScale
from ..stored import stored_weight
from . import deepseek

MODEL_TYPES = ("axk2",)


def declare(config: Any) -> Family:
    heads, wide = config.num_attention_heads, config.v_head_dim

    def gate(attention: Any, outputs: list[Tensor], y: Tensor) -> Tensor:
        return torch.sigmoid(outputs[0].unflatten(-1, (heads, -1))[..., -wide:].flatten(-2))

    return replace(
        deepseek.declare(config),
        selects=config.index_topk,
        q_proj="self_attn.q_gate_proj",
        q_part=lambda weight: weight.unflatten(0, (heads, -1))[:, :-wide].flatten(0, 1),
        head_scale=HeadScale(("q_gate_proj",), gate),
        norm_gate=_gate,
    )


def _gate(module: Any, y: Tensor) -> Tensor:
    first, second = (stored_weight(one).to(y) for one in (module.mlp.fc1, module.mlp.fc2))
    return torch.sigmoid(linear(silu(linear(y, first)), second))
