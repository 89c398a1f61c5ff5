"""Adapters: a model's weights and modules, found by a declaration of its family.

A family is one short file. It names the ``model_type`` that it stands for (``MODEL_TYPES``) and declares a
:class:`Family` for a config; :func:`adapt` finds it. `docs/adding-a-family.md` shows how to write one.
"""

from __future__ import annotations

import copy
import importlib
import os
import pkgutil
from types import ModuleType
from typing import Any, cast

from torch import nn

from . import families
from .activation import Activation
from .adapter import Adapter
from .biasless import without_biases
from .experts import ExpertAssignment, RoutedExpert, sort_choices
from .family import Beside, Experts, Family, HeadScale, InputGate, Keyed, Mixer, Observed
from .looked_up import looked_up_once
from .maps import Latent, Linear, Norm
from .missing import missing_path
from .query_key import QueryKey, query_key, query_key_norms
from .recurrence import Recurrence
from .streams import LayerStreams, Streams, StreamStep
from .unsupported import REASONS
from .unwrap import unwrap
from .weights import Attention, Branch, Layer, Mlp

__all__ = [
    "Activation",
    "Adapter",
    "Attention",
    "Beside",
    "Branch",
    "ExpertAssignment",
    "Experts",
    "Family",
    "HeadScale",
    "InputGate",
    "Keyed",
    "Latent",
    "Layer",
    "LayerStreams",
    "Linear",
    "Mixer",
    "Mlp",
    "Norm",
    "Observed",
    "QueryKey",
    "Recurrence",
    "RoutedExpert",
    "StreamStep",
    "Streams",
    "adapt",
    "family_file",
    "looked_up_once",
    "query_key",
    "query_key_norms",
    "sort_choices",
    "supported_families",
    "unwrap",
    "without_biases",
]

_FILES = [
    importlib.import_module(f"{families.__name__}.{found.name}") for found in pkgutil.iter_modules(families.__path__)
]
_FAMILIES: dict[str, ModuleType] = {name: file for file in _FILES for name in file.MODEL_TYPES}


def supported_families() -> tuple[str, ...]:
    """The ``model_type`` of every supported family."""
    return tuple(sorted(_FAMILIES))


def family_file(model_type: str) -> str | None:
    """The name of the file that declares the family of a ``model_type``, or None if it is not supported."""
    return _FAMILIES[model_type].__name__.rpartition(".")[2] if model_type in _FAMILIES else None


def adapt(model: nn.Module) -> Adapter:
    """The adapter of a loaded causal language model.

    A fork, whose config is a subclass of a supported family's, is taken for a model of that family.

    Raises:
        TypeError: ``model`` is no Hugging Face model (it has no ``config``), or no causal language model.
        ValueError: its family is not supported (the message names those that are), its attention looks ahead, or it is
            a fork without the modules of its family.
    """
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type is None:
        hint = " DePass.from_pretrained(path) loads one." if isinstance(model, str | os.PathLike) else ""
        raise TypeError(
            f"model: expected a loaded Hugging Face causal language model, got {type(model).__name__}.{hint}"
        )
    family = family_of(config)
    if family is None:
        known_reason = "it has an encoder" if getattr(config, "is_encoder_decoder", False) else None
        reason = REASONS.get(model_type, known_reason)
        reason = "" if reason is None else f" ({reason})"
        known = ", ".join(supported_families())
        raise ValueError(f"model: family {model_type!r} is not supported{reason}. Supported families: {known}.")
    if cast(Any, model).get_output_embeddings() is None:
        raise TypeError(f"model: {type(model).__name__} has no unembedding; load it with AutoModelForCausalLM instead.")
    declared = copy.copy(config)
    declared.model_type = family
    adapter = Adapter(model, _FAMILIES[family].declare(declared))
    if (missing := missing_path(adapter)) is not None:
        raise ValueError(
            f"model: {type(model).__name__} has no {missing}, where the family {family!r} keeps it; a fork must keep "
            "its family's modules under their names."
        )
    for index in range(adapter.n_layers if adapter.family.v_norm is not None else 0):
        adapter.attention(index)  # raises ValueError for a latent that it cannot express
    ahead = getattr(adapter.config, "use_bidirectional_attention", False)  # "vision": pictures alone do
    if not getattr(adapter.config, "is_causal", True) or (ahead and ahead != "vision"):
        raise ValueError("model: its attention looks ahead, by its config; only causal models are decomposed.")
    return adapter


def family_of(config: Any) -> str | None:
    """The supported ``model_type`` of a config, or the most specific one of its class's ancestors; None without one."""
    own = [config.model_type, *(vars(base).get("model_type") for base in type(config).__mro__)]
    return next((name for name in own if name in _FAMILIES), None)
