"""Mamba-2 and its hybrids: Bamba and Granite 4 beside attention and MLP, Nemotron-H with one branch in every layer."""

from dataclasses import replace
from typing import Any

import torch

from ..family import Experts, Family, HeadScale, Mixer, first_half, second_half
from ..recurrent import gated_group_norm, state_space

MODEL_TYPES = ("mamba2", "bamba", "granitemoehybrid", "nemotron_h")


def declare(config: Any) -> Family:
    if config.model_type == "mamba2":
        inner = int(config.expand * config.hidden_size)
        home = Family(
            layers="backbone.layers", embedding="backbone.embeddings", final_norm="backbone.norm_f", mlp=None,
            attention_norm="norm", mlp_norm=None,
        )  # fmt: skip
        return mixing(home, "mixer", inner, config.head_dim)
    inner = config.mamba_num_heads * config.mamba_head_dim if config.model_type == "nemotron_h" else 0
    if config.model_type == "nemotron_h":
        return _nemotron(config, inner)
    inner = int(config.mamba_expand * config.hidden_size)
    if config.model_type == "bamba":
        names = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}
        paths: dict[str, Any] = {part: f"feed_forward.{name}" for part, name in names.items()}
        full = Family(
            final_norm="model.final_layernorm", mlp="feed_forward", mlp_norm="pre_ff_layernorm", **paths,
            act_fn="feed_forward.act_fn",
        )  # fmt: skip
    else:
        full = _granite(config)
    linear = mixing(full, "mamba", inner, inner // config.mamba_n_heads)
    return replace(
        full, kinds=tuple(linear if kind == "linear_attention" else full for kind in config.layers_block_type)
    )


def mixing(family: Family, home: str, inner: int, head_dim: int) -> Family:
    """The declaration of a layer of that family whose attention is a Mamba-2 mixer."""
    return replace(
        family,
        attention=home,
        mixer=Mixer(
            ("in_proj",),
            lambda mixer, outputs, convolve: state_space(mixer, outputs[0], convolve),
            f"{home}.conv1d",
            lambda weight: weight[:inner],
            torch.sigmoid,
        ),
        head_scale=HeadScale(
            ("in_proj",),
            lambda mixer, outputs, y: gated_group_norm(
                mixer.norm, outputs[0][:, :inner], y, getattr(mixer.norm, "group_size", inner)
            ),
        ),
        v_proj=f"{home}.in_proj",
        v_part=lambda weight: weight[inner : 2 * inner],
        o_proj=f"{home}.out_proj",
        value_dim=head_dim,
        key_dim=head_dim,
        q_norm=None,
        k_norm=None,
    )


def _granite(config: Any) -> Family:
    common: dict[str, Any] = {"factor": config.residual_multiplier, "logit_scale": 1.0 / config.logits_scaling}
    if not config.num_local_experts:
        return Family(
            mlp="shared_mlp", gate_proj="shared_mlp.input_linear", gate_part=first_half,
            up_proj="shared_mlp.input_linear", up_part=second_half, down_proj="shared_mlp.output_linear",
            act_fn="shared_mlp.activation", **common,
        )  # fmt: skip
    experts = Experts(
        top_k=config.num_experts_per_tok, router="block_sparse_moe.router", experts="block_sparse_moe.experts",
        shared="shared_mlp", gate="input_linear", fused=True, down="output_linear", act_fn=("act_fn", "activation"),
    )  # fmt: skip
    return Family(mlp="block_sparse_moe", experts=experts, **common)


def _nemotron(config: Any, inner: int) -> Family:
    if "moe" in config.layers_block_type:
        raise ValueError(
            "model: the experts of this Nemotron-H have one projection in (or read a latent); not supported."
        )
    bare = Family(
        embedding="model.embeddings", final_norm="model.norm_f", attention_norm="norm", mlp_norm="norm",
        attention="mixer", mlp="mixer", v_proj="mixer.v_proj", o_proj="mixer.o_proj", q_proj="mixer.q_proj",
        k_proj="mixer.k_proj", gate_proj="mixer.up_proj", up_proj=None, down_proj="mixer.down_proj", act_fn="mixer.act_fn",
    )  # fmt: skip
    full = replace(bare, mlp=None, mlp_norm=None)
    linear = mixing(full, "mixer", inner, config.mamba_head_dim)
    kinds = {
        "linear_attention": linear,
        "full_attention": full,
        "mlp": replace(bare, attention=None, attention_norm=None),
    }
    return replace(full, kinds=tuple(kinds[kind] for kind in config.layers_block_type))
