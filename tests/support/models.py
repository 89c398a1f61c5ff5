"""Small random models of a few families, and prompts for them."""

from __future__ import annotations

import functools

import torch

from depass_fast import DePass
from tests.support.family_models import build_model

# name -> (model_type, what differs from the shape of tests/support/family_models.py)
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


def runs(model: torch.nn.Module) -> bool:
    """True if this version of transformers runs the model in its dtype: some code of theirs knows float32 alone."""
    try:
        with torch.no_grad():
            model(torch.tensor([random_ids(3)]))
    except RuntimeError:
        return False
    return True


def random_ids(length: int, seed: int = 0, vocabulary: int = 64) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (length,), generator=generator).tolist()
