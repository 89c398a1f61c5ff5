"""A user's own fork of a supported model, never registered."""

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.family_models import build_model


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig


def fork() -> nn.Module:
    """A subclass, never registered, with the weights of the tests' Llama."""
    original = build_model("llama", num_key_value_heads=2)
    changes = {k: v for k, v in original.config.to_dict().items() if k not in ("model_type", "transformers_version")}
    model = OwnForCausalLM(OwnConfig(**changes)).eval()
    model.load_state_dict(original.state_dict())
    return model
