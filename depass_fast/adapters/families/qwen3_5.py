"""Qwen 3.5 and 3.6, dense and mixtures of experts: Qwen3-Next's layers with separate projections.

A model that also sees is decomposed in its language model.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..family import Experts, Family, HeadScale, Mixer
from ..mixer_activation import value_ratio
from ..recurrence import Recurrence
from ..recurrent import gated_delta, gated_head_norm, query_gate, with_mixer

MODEL_TYPES = ("qwen3_5_text", "qwen3_5_moe_text", "qwen3_5", "qwen3_5_moe")


def declare(config: Any) -> Family:
    home = "model.language_model" if config.model_type in ("qwen3_5", "qwen3_5_moe") else "model"
    config = config.get_text_config()
    shared: dict[str, Any] = {"shared": "mlp.shared_expert", "shared_gate": "mlp.shared_expert_gate"}
    has_experts = bool(getattr(config, "num_experts", 0))
    full = Family(
        decoder=home,
        layers=f"{home}.layers",
        embedding=f"{home}.embed_tokens",
        final_norm=f"{home}.norm",
        norm_offset=1.0,
        experts=Experts(top_k=config.num_experts_per_tok, **shared) if has_experts else None,
        **query_gate(config.num_attention_heads, config.head_dim),
    )
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim

    def read(mixer: Any, outputs: list[Tensor], convolve: Callable[..., Tensor]) -> Recurrence:
        return gated_delta(mixer, outputs[0][:, : 2 * keys], outputs[1], outputs[2], convolve)

    def scale(mixer: Any, outputs: list[Tensor], y: Tensor) -> Tensor:
        return gated_head_norm(mixer.norm, outputs[0], y)

    def of_values(weight: Tensor) -> Tensor:
        return weight[-values:]

    ratio = value_ratio(config.hidden_act)
    mixer = Mixer(("in_proj_qkv", "in_proj_b", "in_proj_a"), read, "linear_attn.conv1d", of_values, ratio)
    parts = {"v_proj": "linear_attn.in_proj_qkv", "v_part": of_values}
    gate = HeadScale(("in_proj_z",), scale)
    linear = with_mixer(full, "linear_attn", config.linear_value_head_dim, mixer, gate, **parts)
    kinds = {"linear_attention": linear, "full_attention": full, "indexed_attention": full}  # the last are Qwen 4's
    return replace(full, kinds=tuple(kinds[kind] for kind in config.layer_types))
