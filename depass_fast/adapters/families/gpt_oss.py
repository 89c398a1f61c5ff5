"""gpt-oss: Llama's layout with biases, attention sinks, every second layer's window, experts with biases and clamps."""

from typing import Any

import torch
import transformers
from torch import Tensor

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
            activate=_activate,
        ),
    )


def _activate(experts: Any, gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.clamp(max=experts.limit), up.clamp(-experts.limit, experts.limit)
    return (up + 1) * gate * torch.sigmoid(experts.alpha * gate)
