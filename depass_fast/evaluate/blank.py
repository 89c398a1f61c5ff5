"""An empty model of two layers. The models that are built by hand write their weights into it."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SIZE = 1e4  # of the constant that makes up nearly all of every state, so that a normed state is the state


def blank_model(width: int, head_dim: int, vocabulary: int) -> LlamaForCausalLM:
    """Return a Llama of two layers with two heads each, float32, all of whose weights but the norms' are zero.

    Its norms change nothing where one coordinate of every state is :data:`SIZE`. The rotary embedding turns only the
    first of each half of a head's coordinates.
    """
    of_transformers_4: dict[str, Any] = {"rope_theta": 1e30}
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=2,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=head_dim,
        vocab_size=vocabulary,
        rope_parameters={"rope_type": "default", "rope_theta": 1e30},
        **of_transformers_4,
        rms_norm_eps=1e-12,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(SIZE / math.sqrt(width) if "norm" in name else 0.0)
    return model
