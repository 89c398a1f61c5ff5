"""Mamba-2 alone: every layer is a state space, without an MLP."""

from typing import Any

from ..family import Family
from ..recurrent import with_state_space

MODEL_TYPES = ("mamba2",)


def declare(config: Any) -> Family:
    family = Family(
        layers="backbone.layers",
        embedding="backbone.embeddings",
        final_norm="backbone.norm_f",
        attention_norm="norm",
        mlp=None,
        mlp_norm=None,
    )
    return with_state_space(
        family, "mixer", int(config.expand * config.hidden_size), config.head_dim, config.hidden_act
    )
