"""Hunyuan 4: hyper-connections, DeepSeek's latent attention with selected keys, sinks and gates, experts with clamps.

It adds to its streams in float32, whatever it computes in: in float64 a result is complete to that rounding.
"""

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from ..activation import Activation
from ..family import Family, HeadScale
from ..hyper_connections import HyperConnections, normed_last
from . import deepseek

MODEL_TYPES = ("hy_v4",)


def declare(config: Any) -> Family:
    latent = deepseek.declare(config)
    assert latent.experts is not None
    return replace(
        latent,
        streams=HyperConnections(
            config.hc_mult,
            normed_last("fn", "base", "scale"),
            normed_last("hc_fn", "hc_base", "hc_scale"),
            mixes=False,
        ),
        selects=config.index_topk,
        sinks=True,
        head_scale=HeadScale(("gate_proj",), _gate),
        experts=replace(latent.experts, activation=_activation),
    )


def _gate(attention: Any, outputs: list[Tensor], heads: Tensor) -> Tensor:
    return torch.sigmoid(outputs[0])


def _activation(held: Any) -> Activation:
    """That of the experts, which are clamped, or of the shared one."""
    return _clamped(held.swiglu_limit) if hasattr(held, "swiglu_limit") else Activation(held.act_fn)


@lru_cache(maxsize=8)  # the same for all experts and layers
def _clamped(limit: float) -> Activation:
    return Activation(silu, gate_limit=limit, up_limit=limit)
