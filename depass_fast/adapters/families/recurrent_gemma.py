"""RecurrentGemma (Griffin): two layers of a gated linear recurrence (RG-LRU), then one of local attention.

Every channel of the recurrence is a head of width one: h[t] = a[t] h[t-1] + i[t] sqrt(1 - a[t]²) x[t], with a and i
gates of x, and no square root at a prompt's first position.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ..family import Family, HeadScale, Mixer
from ..recurrence import Recurrence
from ..recurrent import wide, with_mixer

MODEL_TYPES = ("recurrent_gemma",)


def declare(config: Any) -> Family:
    home, mlp = "temporal_block", "mlp_block"
    paths: dict[str, Any] = {f"{name}_proj": f"{home}.{name}_proj" for name in "qkvo"}
    paths |= {f"{name}_proj": f"{mlp}.{name}_proj" for name in ("gate", "up", "down")}
    full = Family(
        final_norm="model.final_norm",
        logit_cap=config.logits_soft_cap,
        norm_offset=1.0,
        attention=home,
        attention_norm="temporal_pre_norm",
        mlp=mlp,
        mlp_norm="channel_pre_norm",
        act_fn=f"{mlp}.act_fn",
        **paths,
    )
    gate = HeadScale(("linear_y",), lambda block, outputs, heads: block.act_fn(wide(outputs[0])))
    linear = with_mixer(full, home, 1, Mixer(("linear_x",), _read, f"{home}.conv_1d"), gate, v_proj=f"{home}.linear_x")
    linear = replace(linear, o_proj=f"{home}.linear_out")
    return replace(
        full, kinds=tuple(linear if kind == "linear_attention" else full for kind in config.layers_block_type)
    )


def _read(block: Any, outputs: list[Tensor], convolve: Callable[..., Tensor]) -> Recurrence:
    unit, x = block.rg_lru, convolve(wide(outputs[0]), block.conv_1d)
    by_block = x.unflatten(1, (unit.num_attention_heads, -1))  # (T, blocks, width)

    def gate(name: str) -> Tensor:
        weight, bias = (getattr(unit, f"{name}_gate_{part}").to(x) for part in ("weight", "bias"))
        return torch.sigmoid(torch.einsum("tbi,bio->tbo", by_block, weight) + bias).flatten(1)

    decay = -8.0 * gate("recurrent") * softplus(wide(unit.recurrent_param))
    before = nn.Conv1d(1, 1, 2, bias=False, device="meta")
    before.weight = nn.Parameter(x.new_tensor([[[1.0, 0.0]]]))  # what stands one position before: zero at the first
    is_first = convolve(x.new_ones(len(x), 1), before) == 0
    write = gate("input") * torch.where(is_first, 1.0, torch.sqrt(1 - torch.exp(2 * decay)))
    one = x.new_ones(len(x), 1, 1)
    return Recurrence(one, one.clone(), decay[..., None], write=write)
