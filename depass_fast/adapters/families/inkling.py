"""Inkling: convolutions behind keys, values and branches, logits with a bias by distance, two kinds of experts."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..family import Experts, Family, Mixer
from ..recurrence import Recurrence
from ..recurrent import softmax_by_distance

MODEL_TYPES = ("inkling_text",)
_SIZES = ("num_attention_heads", "num_key_value_heads", "head_dim")


def declare(config: Any) -> Family:
    experts = Experts(
        top_k=config.num_experts_per_tok + config.n_shared_experts,
        always="mlp.shared_experts",
        decide=lambda layer, returned: _choice(config.n_routed_experts, returned),
    )
    common = Family(
        vocabulary=config.unpadded_vocab_size,
        logit_scale=1.0 / config.logits_mup_width_multiplier,
        counts_positions=True,  # convolutions would go from one prompt to the next
        attention_conv="attn_sconv",
        mlp_conv="mlp_sconv",
    )
    kinds = []
    for kind, mlp in zip(config.layer_types, config.mlp_layer_types, strict=True):
        names = (f"{'swa_' if kind == 'hybrid_sliding' else ''}{name}" for name in _SIZES)
        one = _with_attention(common, *(getattr(config, name) for name in names))
        kinds.append(replace(one, experts=experts) if mlp == "sparse" else replace(one, mlp_mix=_scale))
    return replace(common, kinds=tuple(kinds))


def _with_attention(family: Family, heads: int, kv: int, width: int) -> Family:
    values = lambda x: x.unflatten(0, (kv, width)).repeat_interleave(heads // kv, 0).flatten(0, 1)  # noqa: E731
    conv = "self_attn.v_sconv.conv1d"
    mixer = Mixer(("q_proj", "k_proj", "r_proj"), _read, conv, values, None, True, conv_adds=True)
    return replace(family, mixer=mixer, v_part=values, value_dim=width, key_dim=width)


def _scale(layer: Any) -> tuple[Tensor, Tensor, None]:
    scale = layer.mlp.global_scale.detach().expand(layer.hidden_size)
    return torch.ones_like(scale), scale, None


def _choice(count: int, returned: Any) -> tuple[Tensor, Tensor]:
    _, weights, chosen, always = returned
    numbers = torch.arange(count, count + always.shape[-1], device=chosen.device).expand(len(chosen), -1)
    return torch.cat([weights, always.view(len(chosen), -1)], -1), torch.cat([chosen, numbers], -1)


def _read(attention: Any, outputs: list[Tensor], convolve: Callable[..., Tensor], named: dict[str, Any]) -> Recurrence:
    q, k, r = outputs
    return softmax_by_distance(attention, q, k, r, convolve)
