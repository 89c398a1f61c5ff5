"""Kimi Linear: most layers are a delta rule whose state decays by channel, the others DeepSeek's latent attention."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..family import Family, HeadScale, Mixer
from ..mixer_activation import value_ratio
from ..recurrence import Recurrence
from ..recurrent import delta_rule, gated_head_norm, wide
from . import deepseek

MODEL_TYPES = ("kimi_linear",)


def declare(config: Any) -> Family:
    full, width = deepseek.declare(config), config.linear_num_heads * config.linear_head_dim
    linear = Family(
        experts=full.experts,
        mixer=Mixer(
            ("q_proj", "k_proj", "b_proj", "forget_gate.f_b_proj"),
            _read,
            "self_attn.conv1d",
            lambda weight: weight[-width:],
            value_ratio(config.hidden_act),
        ),
        head_scale=HeadScale(
            ("g_b_proj",), lambda mixer, outputs, y: gated_head_norm(mixer.o_norm, outputs[0], y, torch.sigmoid)
        ),
        value_dim=config.linear_head_dim,
        key_dim=config.linear_head_dim,
        q_norm=None,
        k_norm=None,
    )
    return replace(full, kinds=tuple(linear if kind == "linear_attention" else full for kind in config.layer_types))


def _read(mixer: Any, outputs: list[Tensor], convolve: Callable[..., Tensor]) -> Recurrence:
    q, k, beta, forget = outputs
    gate = mixer.forget_gate
    steps = softplus(wide(forget) + wide(gate.dt_bias)).unflatten(-1, (mixer.num_heads, -1))
    decay = -wide(gate.A_log).view(-1, 1).exp() * steps
    return delta_rule(mixer, torch.cat([q, k], -1), beta, decay, mixer.head_dim, convolve)
