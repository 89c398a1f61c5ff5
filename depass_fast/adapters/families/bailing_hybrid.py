"""Ling 2.5 (Bailing hybrid): Kimi Linear's delta rule, decays perhaps bounded, beside latent attention whose heads
are gated.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..family import Family, HeadScale
from ..recurrence import Recurrence
from ..recurrent import delta_rule, gated_head_norm, wide
from . import kimi_linear

MODEL_TYPES = ("bailing_hybrid",)


def declare(config: Any) -> Family:
    common = kimi_linear.declare(config)
    assert common.kinds is not None
    full = replace(common, kinds=None, head_scale=HeadScale(("g_proj",), _gate))

    def kind(one: Family) -> Family:
        if one.mixer is None:
            return full
        projections = ("q_proj", "k_proj", "b_proj", "forget_gate.f_proj")
        scale = HeadScale(
            ("g_proj",), lambda mixer, outputs, y: gated_head_norm(mixer.o_norm, outputs[0], y, torch.sigmoid)
        )
        return replace(one, mixer=replace(one.mixer, projections=projections, read=_read), head_scale=scale)

    return replace(full, kinds=tuple(map(kind, common.kinds)))


def _gate(attention: Any, outputs: list[Tensor], heads: Tensor) -> Tensor:
    return torch.sigmoid(outputs[0]).repeat_interleave(attention.v_head_dim, 1)


def _read(mixer: Any, outputs: list[Tensor], convolve: Callable[..., Tensor]) -> Recurrence:
    q, k, beta, forget = outputs
    gate = mixer.forget_gate
    steps = (wide(forget) + wide(gate.dt_bias)).unflatten(-1, (mixer.num_heads, -1))
    rate = wide(gate.A_log).view(-1, 1).exp()
    decay = gate.lower_bound * torch.sigmoid(rate * steps) if gate.safe_gate else -rate * softplus(steps)
    return delta_rule(mixer, torch.cat([q, k], -1), beta, decay, mixer.head_dim, convolve)
