"""Qwen3-Next, Qwen 3.5 and 3.6: three layers of gated delta rule, then one of gated attention; MLP or mixture of experts.

Norms store γ - 1. A model that also sees is decomposed in its language model.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..family import Experts, Family, HeadScale, Mixer
from ..recurrence import Recurrence
from ..recurrent import gated_delta, gated_head_norm

MODEL_TYPES = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_5", "qwen3_5_moe")


def declare(config: Any) -> Family:
    home = "model.language_model" if config.model_type in ("qwen3_5", "qwen3_5_moe") else "model"
    text = config.get_text_config()
    experts = None
    if getattr(text, "num_experts", 0):
        shared: dict[str, Any] = {"shared": "mlp.shared_expert", "shared_gate": "mlp.shared_expert_gate"}
        experts = Experts(top_k=text.num_experts_per_tok, **shared)
    width, heads = text.head_dim, text.num_attention_heads
    full = Family(
        decoder=home,
        layers=f"{home}.layers",
        embedding=f"{home}.embed_tokens",
        final_norm=f"{home}.norm",
        norm_offset=1.0,
        experts=experts,
        q_part=lambda weight: weight.unflatten(0, (heads, 2, width))[:, 0].flatten(0, 1),
        head_scale=HeadScale(("q_proj",), lambda attention, outputs, y: _gate(outputs[0], width)),
    )
    linear = _linear(full, text, fused=config.model_type == "qwen3_next")
    return replace(full, kinds=tuple(linear if kind == "linear_attention" else full for kind in text.layer_types))


def _gate(q: Tensor, width: int) -> Tensor:
    return torch.sigmoid(q.unflatten(-1, (-1, 2, width))[..., 1, :].flatten(-2))


def _linear(full: Family, config: Any, fused: bool) -> Family:
    n_k, n_v = config.linear_num_key_heads, config.linear_num_value_heads
    k, v = config.linear_key_head_dim, config.linear_value_head_dim
    own = n_v // n_k * v  # values of a group of heads

    def part(first: int, last: int) -> Callable[[Tensor], Tensor]:  # of each group's [q; k; v; z], on the first axis
        return lambda x: x.unflatten(0, (n_k, -1))[:, first:last].flatten(0, 1)

    def read(mixer: Any, outputs: list[Tensor], convolve: Callable[..., Tensor]) -> Recurrence:
        if not fused:
            return gated_delta(mixer, outputs[0][:, : 2 * n_k * k], outputs[1], outputs[2], convolve)
        qk = torch.cat([part(0, k)(outputs[0].T), part(k, 2 * k)(outputs[0].T)]).T
        beta, a = (x.flatten(1) for x in outputs[1].unflatten(-1, (n_k, 2, -1)).unbind(2))
        return gated_delta(mixer, qk, beta, a, convolve)

    names = ("in_proj_qkvz", "in_proj_ba") if fused else ("in_proj_qkv", "in_proj_b", "in_proj_a")
    gate = part(2 * k + own, 2 * (k + own)) if fused else lambda x: x
    mixer = Mixer(names, read, "linear_attn.conv1d", lambda w: w[-n_v * v :], torch.sigmoid)
    return replace(
        full,
        attention="linear_attn",
        mixer=mixer,
        head_scale=HeadScale(
            (names[0] if fused else "in_proj_z",),
            lambda m, outputs, y: gated_head_norm(m.norm, gate(outputs[0].T).T, y),
        ),
        v_proj=f"linear_attn.{names[0]}",
        v_part=part(2 * k, 2 * k + own) if fused else lambda weight: weight[-n_v * v :],
        o_proj="linear_attn.out_proj",
        value_dim=v,
        key_dim=k,
        q_norm=None,
        k_norm=None,
    )
