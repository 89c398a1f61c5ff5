"""Where each model family keeps its norms, its V and O, its gate and down projections.

A family is one short file that declares a :class:`Family`; :func:`adapt` finds it by the model's ``model_type``.
"""

from __future__ import annotations

from torch import nn

from . import llama, mistral, qwen
from .base import Adapter, Attention, Family, Layer, Mlp, Norm
from .unwrap import unwrap

__all__ = ["Adapter", "Attention", "Family", "Layer", "Mlp", "Norm", "adapt", "supported_families", "unwrap"]

_FAMILIES: dict[str, Family] = {
    name: module.FAMILY for module in (llama, mistral, qwen) for name in module.FAMILY.model_types
}


def supported_families() -> tuple[str, ...]:
    """The ``model_type`` of every supported family."""
    return tuple(_FAMILIES)


def adapt(model: nn.Module) -> Adapter:
    """The adapter of a loaded causal language model.

    Raises:
        TypeError: ``model`` is no Hugging Face model (it has no ``config``), or no causal language model.
        ValueError: its family is not supported; the message names those that are.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type is None:
        raise TypeError(f"model: expected a loaded Hugging Face causal language model, got {type(model).__name__}.")
    family = _FAMILIES.get(model_type)
    if family is None:
        raise ValueError(
            f"model: family {model_type!r} is not supported. Supported families: {', '.join(supported_families())}."
        )
    if model.get_output_embeddings() is None:
        raise TypeError(f"model: {type(model).__name__} has no unembedding; load it with AutoModelForCausalLM instead.")
    return Adapter(model, family)
