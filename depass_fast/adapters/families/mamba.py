"""Mamba-1: every channel is a head of width one. Mamba and Falcon-Mamba alone, Jamba beside attention and mixtures."""

from dataclasses import replace
from typing import Any

from torch.nn.functional import silu

from ..family import Experts, Family, HeadScale, Mixer, first_half
from ..mixer_activation import value_ratio
from ..recurrent import selective_scan, wide

MODEL_TYPES = ("mamba", "falcon_mamba", "jamba")


def declare(config: Any) -> Family:
    if config.model_type != "jamba":
        paths: dict[str, Any] = {"layers": "backbone.layers", "embedding": "backbone.embeddings"}
        return _mixing(
            Family(final_norm="backbone.norm_f", attention_norm="norm", mlp=None, mlp_norm=None, **paths),
            "mixer",
            config.hidden_act,
        )
    home = "feed_forward"
    full = Family(
        final_norm="model.final_layernorm",
        mlp=home,
        mlp_norm="pre_ff_layernorm",
        gate_proj=f"{home}.gate_proj",
        up_proj=f"{home}.up_proj",
        down_proj=f"{home}.down_proj",
        act_fn=f"{home}.act_fn",
        experts=Experts(top_k=config.num_experts_per_tok, router=f"{home}.router", experts=f"{home}.experts"),
    )
    mixing = _mixing(full, "mamba", config.hidden_act)
    return replace(full, kinds=tuple(mixing if kind == "mamba" else full for kind in config.layers_block_type))


def _mixing(family: Family, home: str, activation: str) -> Family:
    return replace(
        family,
        attention=home,
        mixer=Mixer(
            ("in_proj",),
            lambda mixer, outputs, convolve: selective_scan(mixer, outputs[0].chunk(2, -1)[0], convolve),
            f"{home}.conv1d",
            value_ratio=value_ratio(activation),
        ),
        head_scale=HeadScale(("in_proj",), lambda mixer, outputs, y: silu(wide(outputs[0].chunk(2, -1)[1]))),
        v_proj=f"{home}.in_proj",
        v_part=first_half,
        o_proj=f"{home}.out_proj",
        value_dim=1,
        key_dim=1,
        q_norm=None,
        k_norm=None,
    )
