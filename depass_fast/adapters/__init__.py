"""Where each model family keeps its norms, its V and O, its gate and down projections.

A family is one short file that says for which ``model_type`` it stands (``MODEL_TYPES``) and declares a
:class:`Family` for a config; :func:`adapt` finds it. `docs/adding-a-family.md` shows how to write one.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

from torch import nn

from . import families
from .adapter import Adapter
from .experts import route
from .family import Experts, Family, Observed
from .unwrap import unwrap
from .weights import Attention, Branch, Layer, Linear, Mlp, Norm

__all__ = [
    "Adapter",
    "Attention",
    "Branch",
    "Experts",
    "Family",
    "Layer",
    "Linear",
    "Mlp",
    "Norm",
    "Observed",
    "adapt",
    "route",
    "supported_families",
    "unwrap",
]

_FILES = [
    importlib.import_module(f"{families.__name__}.{found.name}") for found in pkgutil.iter_modules(families.__path__)
]
_FAMILIES: dict[str, ModuleType] = {name: file for file in _FILES for name in file.MODEL_TYPES}


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
    file = _FAMILIES.get(model_type)
    if file is None:
        raise ValueError(
            f"model: family {model_type!r} is not supported. Supported families: {', '.join(supported_families())}."
        )
    if model.get_output_embeddings() is None:
        raise TypeError(f"model: {type(model).__name__} has no unembedding; load it with AutoModelForCausalLM instead.")
    return Adapter(model, file.declare(config))
