"""Small random models of every supported family, all norm weights and biases randomised."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from depass_fast import DePass
from depass_fast.demo import load_demo

torch.set_num_threads(1)  # the models are tiny: threads would only wait for each other

_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}

# name -> (model_type, what differs from _SHAPE)
FAMILIES = {
    "llama-mha": ("llama", {"num_key_value_heads": 4}),
    "llama-gqa": ("llama", {"num_key_value_heads": 2}),
    "llama-biases": ("llama", {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}),
    "mistral-window": ("mistral", {"num_key_value_heads": 2, "sliding_window": 3}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "qwen2-window": (
        "qwen2",
        {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0},
    ),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    "qwen3-biases": ("qwen3", {"num_key_value_heads": 1, "head_dim": 16, "attention_bias": True}),
}


@functools.cache
def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> DePass:
    """A random model of a family; shared by the tests, which never change it."""
    model_type, changes = FAMILIES[name]
    return DePass(build_model(model_type, seed=seed, **changes).to(dtype))


def build_model(model_type: str, seed: int = 0, **changes) -> torch.nn.Module:
    config = AutoConfig.for_model(model_type, **{**_SHAPE, **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(0.0 if name.endswith("bias") else 1.0, 0.3)
    return model


def random_ids(length: int, seed: int = 0, vocabulary: int = 64) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (length,), generator=generator).tolist()


@pytest.fixture(params=FAMILIES)
def family(request) -> DePass:
    return build(request.param)


@pytest.fixture(scope="session")
def demo() -> DePass:
    return DePass(*load_demo())
