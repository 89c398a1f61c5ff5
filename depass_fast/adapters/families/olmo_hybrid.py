"""OLMo Hybrid: three layers of gated delta rule with norms in front, then one of attention with norms behind."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..family import Family, HeadScale, Mixer
from ..mixer_activation import value_ratio
from ..recurrence import Recurrence
from ..recurrent import gated_delta, gated_head_norm

MODEL_TYPES = ("olmo_hybrid",)


def declare(config: Any) -> Family:
    width = config.linear_num_value_heads * config.linear_value_head_dim
    full = Family(
        attention_norm=None,
        attention_output_norm="post_attention_layernorm",
        mlp_norm=None,
        mlp_output_norm="post_feedforward_layernorm",
    )
    linear = Family(
        attention="linear_attn",
        mixer=Mixer(
            ("q_proj", "k_proj", "b_proj", "a_proj"),
            _read,
            "linear_attn.conv1d",
            lambda weight: weight[-width:],
            value_ratio(config.hidden_act),
        ),
        head_scale=HeadScale(("g_proj",), lambda mixer, outputs, y: gated_head_norm(mixer.o_norm, outputs[0], y)),
        v_proj="linear_attn.v_proj",
        o_proj="linear_attn.o_proj",
        value_dim=config.linear_value_head_dim,
        key_dim=config.linear_key_head_dim,
        q_norm=None,
        k_norm=None,
    )
    return replace(full, kinds=tuple(linear if kind == "linear_attention" else full for kind in config.layer_types))


def _read(mixer: Any, outputs: list[Tensor], convolve: Callable[..., Tensor]) -> Recurrence:
    q, k, beta, a = outputs
    made = gated_delta(mixer, torch.cat([q, k], -1), beta, a, convolve)
    if made.write is None or not mixer.allow_neg_eigval:
        return made
    return replace(made, write=made.write * 2)
