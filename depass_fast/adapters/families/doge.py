"""Doge: factors of the residual stream by channel, and logits raised by a number of every key's values, frozen.

In prompts of more than `keep_window_size` tokens every head would select keys of its own; they are refused.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, softplus

from ..family import Family, Mix, Observed, read_rotary
from ..recurrent import wide
from ..stored import stored_weight

MODEL_TYPES = ("doge",)


def declare(config: Any) -> Family:
    if config.is_moe:
        raise ValueError("model: its router mixes the logits of different tokens, so that its routing looks ahead.")
    return Family(
        attention_mix=_mix("input_residual"),
        mlp_mix=_mix("post_attention_residual"),
        observed=Observed(("q_proj", "k_proj", "v_proj"), _read),
        always_observed=True,
        alibi=True,
        window=config.sliding_window,
    )


def _mix(name: str) -> Mix:
    return lambda layer: (getattr(layer, name).detach(), torch.ones_like(getattr(layer, name)), None)


def _read(attention: Any, outputs: list[Tensor], kwargs: dict[str, Any]) -> dict[str, Any]:
    n = outputs[0].shape[1]
    if n > attention.keep_window_size:
        raise ValueError(
            f"prompt: of {n} tokens every head of this model selects {attention.keep_window_size} keys of its own, "
            "which no decomposition knows; take a shorter one."
        )
    by_head = (x.unflatten(-1, (-1, attention.head_dim)) for x in outputs[:2])
    normed = [norm(x).flatten(2) for norm, x in zip((attention.q_norm, attention.k_norm), by_head, strict=True)]
    x, bias = wide(outputs[2][0]), attention.dt_proj.bias
    step = linear(x, stored_weight(attention.dt_proj).to(x), None if bias is None else bias.to(x))
    raised = torch.exp(wide(attention.A) * softplus(step)).repeat_interleave(attention.num_key_value_groups, 1)
    read = read_rotary(attention, [*normed, outputs[2]], kwargs)
    return {**read, "scale": attention.scaling, "key_bias": lambda length: raised}
