"""ZAYA: compressed convolutional attention, factors and constants of the residual stream, one expert per position.

Queries and keys pass convolutions, which are frozen. Half of the channels of values are those of the position before.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..family import Experts, Family, Mixer
from ..recurrence import Recurrence, Softmax

MODEL_TYPES = ("zaya",)


def declare(config: Any) -> Family:
    if config.attention_bias:
        raise ValueError("model: the bias of its delayed values (attention_bias) is that of no position at the first.")
    kv, width, home = config.num_key_value_heads, config.head_dim, "self_attn.qkv_proj"
    groups, half = config.num_attention_heads // kv, kv * width // 2
    taps = torch.tensor([[0.0, 1.0]] * half + [[1.0, 0.0]] * half)
    values = lambda weight: weight.unflatten(0, (kv, width)).repeat_interleave(groups, 0).flatten(0, 1)  # noqa: E731
    return Family(
        attention_mix=partial(_mix, "post_attention_residual_scale"),
        mlp_mix=partial(_mix, "post_mlp_residual_scale"),
        mixer=Mixer(("qkv_proj.q_proj", "qkv_proj.k_proj"), _read, None, values, None, True, taps),
        v_proj=f"{home}.v_proj_current",
        v_second=f"{home}.v_proj_delayed",
        v_part=values,
        value_dim=width,
        key_dim=width,
        counts_positions=True,  # convolutions would go from one prompt to the next
        experts=Experts(top_k=config.num_experts_per_tok),
    )


def _mix(name: str, layer: Any) -> tuple[Tensor, Tensor, Tensor]:
    m = getattr(layer, name)
    keeps, factor = m.residual_scale.detach(), m.hidden_states_scale.detach()
    return keeps, factor, (m.hidden_states_bias * factor + m.residual_bias * keeps).detach()


def _read(attention: Any, outputs: list[Tensor], convolve: Callable[..., Tensor], named: dict[str, Any]) -> Recurrence:
    cca, groups = attention.qkv_proj, attention.num_key_value_groups
    both = pad(torch.cat(outputs, -1).T[None], (cca.conv_kernel_size, 0))
    mixed = cca.conv_qk_grouped(cca.conv_qk_depthwise(both))[0].T.unflatten(-1, (-1, cca.head_dim))
    q, k = (x.unflatten(-1, (-1, cca.head_dim)) for x in outputs)
    q = (q + k.repeat_interleave(groups, 1)) * 0.5
    k = q.unflatten(1, (-1, groups)).mean(2)
    of_q, of_k = mixed.split([q.shape[1], k.shape[1]], 1)
    q, k = (x.transpose(1, 2) for x in attention.qk_norm((of_q + q)[None], (of_k + k)[None]))
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    q, k = (x[0].transpose(0, 1).contiguous() for x in rotate(q, k, *named["position_embeddings"]))
    return Recurrence(q, k, None, softmax=Softmax(attention.scaling, attention.sliding_window))
