"""MiniMax: lightning attention in most layers, mixtures; the stream is normed in front of a branch, which adds to that.

So every norm but the last is one of the stream itself, behind the branch before it, and stream and branch have factors.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..family import Experts, Family, HeadScale, Mixer, of_each_head
from ..mixer_activation import value_ratio
from ..recurrence import Recurrence
from ..recurrent import gated_head_norm, wide, with_mixer

MODEL_TYPES = ("minimax",)


def declare(config: Any) -> Family:
    heads, home = config.num_attention_heads, "self_attn"
    full = Family(
        attention_norm=None,
        attention_stream_norm="post_attention_layernorm",
        mlp_norm=None,
        mlp_stream_norm="next.input_layernorm",
        mlp_keeps=config.mlp_alpha_factor,
        mlp_factor=config.mlp_beta_factor / config.mlp_alpha_factor,
        experts=Experts(top_k=config.num_experts_per_tok),
    )
    mixer = Mixer(("qkv_proj",), _read, value_ratio=value_ratio(config.hidden_act))
    scale = HeadScale(
        ("output_gate",), lambda mixer, outputs, y: gated_head_norm(mixer.norm, outputs[0], y, torch.sigmoid)
    )
    parts = {"v_proj": f"{home}.qkv_proj", "v_part": of_each_head(heads, 3, 2)}
    linear = with_mixer(full, home, config.head_dim or config.hidden_size // heads, mixer, scale, **parts)

    def kind(index: int) -> Family:
        name = "linear_attn" if config.layer_types[index] == "linear_attention" else "full_attn"
        alpha, beta = (getattr(config, f"{name}_{which}_factor") for which in ("alpha", "beta"))
        one = linear if name == "linear_attn" else full
        last = {"mlp_stream_norm": None} if index + 1 == config.num_hidden_layers else {}
        return replace(one, attention_keeps=alpha, factor=beta / alpha, **last)

    return replace(full, kinds=tuple(map(kind, range(config.num_hidden_layers))))


def _read(mixer: Any, outputs: list[Tensor], convolve: Callable[..., Tensor]) -> Recurrence:
    q, k, _ = mixer.act_fn(wide(outputs[0])).unflatten(-1, (mixer.num_attention_heads, 3, -1)).unbind(2)
    return Recurrence(q, k, -wide(mixer.slope_rate).view(1, -1, 1).expand(len(q), -1, -1))
