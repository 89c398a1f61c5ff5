"""DiffLlama: differential attention, the difference of two softmaxes for a pair of heads, with a norm behind it.

A pair is one head here. Its probabilities are P1 - λ P2, and its values are those of two KV heads side by side.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..family import Family, HeadScale, Mixer, read_rotary
from ..recurrence import Recurrence, Softmax
from ..recurrent import wide

MODEL_TYPES = ("diffllama",)


def declare(config: Any) -> Family:
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    first = [head * kv // heads for head in range(heads // 2)]
    order = [one for head in first for one in (head, head + kv // 2)]
    return Family(
        mixer=Mixer(("q_proj", "k_proj"), _read, attends=True),
        head_scale=HeadScale((), _norm),
        v_part=lambda weight: weight.unflatten(0, (kv, width))[order].flatten(0, 1),
        value_dim=2 * width,
        key_dim=width,
    )


def _read(attention: Any, outputs: list[Tensor], convolve: Callable[..., Tensor], named: dict[str, Any]) -> Recurrence:
    q, k = (x[None] for x in outputs)
    rotary = read_rotary(attention, [q, k, k], named)
    ways = ((attention.lambda_q1, attention.lambda_k1), (attention.lambda_q2, attention.lambda_k2))
    first, second = ((q * k).sum(dtype=torch.float32).exp().to(outputs[0].dtype) for q, k in ways)
    minus = float(first - second + attention.lambda_init)
    q, k = (rotary[name][0].transpose(0, 1).contiguous() for name in ("q", "k"))
    return Recurrence(q, k, None, softmax=Softmax(attention.scaling, minus=minus))


def _norm(attention: Any, outputs: list[Tensor], heads: Tensor) -> Tensor:
    y = wide(heads).unflatten(-1, (-1, 2 * attention.head_dim))
    scale = torch.rsqrt(y.square().mean(-1, keepdim=True) + attention.groupnorm.eps) * (1 - attention.lambda_init)
    return scale.expand_as(y).flatten(1)
