"""Qwen3-Next: three layers of gated delta rule, then one of gated attention; mixtures of experts. Norms store γ - 1."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..family import Experts, Family, HeadScale, Mixer
from ..mixer_activation import value_ratio
from ..recurrence import Recurrence
from ..recurrent import gated_delta, gated_head_norm, query_gate, with_mixer

MODEL_TYPES = ("qwen3_next",)


def declare(config: Any) -> Family:
    shared: dict[str, Any] = {"shared": "mlp.shared_expert", "shared_gate": "mlp.shared_expert_gate"}
    full = Family(
        norm_offset=1.0,
        experts=Experts(top_k=config.num_experts_per_tok, **shared) if config.num_experts else None,
        **query_gate(config.num_attention_heads, config.head_dim),
    )
    groups, k, v = config.linear_num_key_heads, config.linear_key_head_dim, config.linear_value_head_dim
    own, values = config.linear_num_value_heads // groups * v, config.linear_num_value_heads * v

    def part(first: int, last: int) -> Callable[[Tensor], Tensor]:  # of each group's [q; k; v; z], on the first axis
        return lambda x: x.unflatten(0, (groups, -1))[:, first:last].flatten(0, 1)

    def read(mixer: Any, outputs: list[Tensor], convolve: Callable[..., Tensor]) -> Recurrence:
        qk = torch.cat([part(0, k)(outputs[0].T), part(k, 2 * k)(outputs[0].T)]).T
        beta, a = (x.flatten(1) for x in outputs[1].unflatten(-1, (groups, 2, -1)).unbind(2))
        return gated_delta(mixer, qk, beta, a, convolve)

    def scale(mixer: Any, outputs: list[Tensor], y: Tensor) -> Tensor:
        return gated_head_norm(mixer.norm, part(2 * k + own, 2 * (k + own))(outputs[0].T).T, y)

    names = ("in_proj_qkvz", "in_proj_ba")
    mixer = Mixer(names, read, "linear_attn.conv1d", lambda weight: weight[-values:], value_ratio(config.hidden_act))
    parts = {"v_proj": "linear_attn.in_proj_qkvz", "v_part": part(2 * k, 2 * k + own)}
    linear = with_mixer(full, "linear_attn", v, mixer, HeadScale(names[:1], scale), **parts)
    kinds = {"linear_attention": linear, "full_attention": full}
    return replace(full, kinds=tuple(kinds[kind] for kind in config.layer_types))
