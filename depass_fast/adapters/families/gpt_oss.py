"""gpt-oss: Llama's layout with biases, attention sinks, every second layer's window, experts with biases and clamps."""

from functools import lru_cache
from typing import Any

import torch
import transformers

from ..activation import Activation
from ..family import Experts, Family

MODEL_TYPES = ("gpt_oss",)


def declare(config: Any) -> Family:
    return Family(
        sinks=True,
        layer_windows=True,
        experts=Experts(
            top_k=config.num_experts_per_tok,
            dense=int(transformers.__version__.split(".")[0]) < 5,
            router="mlp.router",
            transposed=True,
            interleaved=True,
            activation=_activation,
        ),
    )


def _activation(experts: Any) -> Activation:
    return _clamped(experts.limit, experts.alpha)


@lru_cache(maxsize=8)  # the same for all experts and layers
def _clamped(limit: float, alpha: float) -> Activation:
    return Activation(lambda x: x * torch.sigmoid(alpha * x), gate_limit=limit, up_limit=limit, up_offset=1.0)
