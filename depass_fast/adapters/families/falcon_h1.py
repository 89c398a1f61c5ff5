"""Falcon-H1: attention and Mamba-2's state space side by side in every layer, and multipliers everywhere."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from ..family import Family, HeadScale, Mixer
from ..mixer_activation import value_ratio
from ..recurrence import Recurrence
from ..recurrent import gated_group_norm, state_space, wide, with_mixer

MODEL_TYPES = ("falcon_h1",)


def declare(config: Any) -> Family:
    of_gate, of_down = config.mlp_multipliers
    attention = Family(
        final_norm="model.final_layernorm",
        logit_scale=config.lm_head_multiplier,
        factor=config.attention_out_multiplier,
        reads=config.attention_in_multiplier,
        mlp="feed_forward",
        mlp_norm="pre_ff_layernorm",
        mlp_factor=of_down,
        gate_proj="feed_forward.gate_proj",
        gate_part=lambda weight: weight * of_gate,
        up_proj="feed_forward.up_proj",
        down_proj="feed_forward.down_proj",
        act_fn="feed_forward.act_fn",
    )
    inner = config.mamba_d_ssm or int(config.mamba_expand * config.hidden_size)
    groups = inner // config.mamba_n_groups

    def multiplied(mixer: Any, outputs: list[Tensor]) -> Tensor:
        return wide(outputs[0]) * mixer.mup_vector.flatten().to(outputs[0])

    def read(mixer: Any, outputs: list[Tensor], convolve: Callable[..., Tensor]) -> Recurrence:
        return state_space(mixer, multiplied(mixer, outputs), convolve)

    def scale(mixer: Any, outputs: list[Tensor], heads: Tensor) -> Tensor:
        gate = multiplied(mixer, outputs)[:, :inner]
        if not config.mamba_rms_norm:
            return silu(gate)
        if not config.mamba_norm_before_gate:
            return gated_group_norm(mixer.norm, gate, heads, groups)
        y = wide(heads).unflatten(-1, (-1, groups))
        s = torch.rsqrt(y.square().mean(-1, keepdim=True) + mixer.norm.variance_epsilon).expand_as(y).flatten(1)
        return s * wide(mixer.norm.weight) * silu(gate)

    mixer = Mixer(("in_proj",), read, "mamba.conv1d", lambda weight: weight[:inner], value_ratio(config.hidden_act))
    of_values = config.ssm_multipliers[1]
    parts = {"v_proj": "mamba.in_proj", "v_part": lambda weight: weight[inner : 2 * inner] * of_values}
    width = inner // config.mamba_n_heads
    linear = with_mixer(attention, "mamba", width, mixer, HeadScale(("in_proj",), scale), **parts)
    return replace(linear, beside=attention, factor=config.ssm_out_multiplier, reads=config.ssm_in_multiplier)
