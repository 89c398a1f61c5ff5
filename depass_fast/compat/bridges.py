"""Bridges for scripts of 2024 over what PyTorch and transformers have changed since. The log names each one once.

- `torch.load` of a pickled object: since PyTorch 2.6 it loads tensors only, unless it is told otherwise.
- `transformers.AutoModelWithLMHead`: gone in transformers 5.
- `output_attentions=True` with an attention that has none to give (sdpa): transformers once fell back to eager.
"""

from __future__ import annotations

import functools
import logging
import pickle
from typing import Any

import torch
import transformers

from ..runtime.log import say_once


def bridge() -> None:
    """Put up the bridges that are needed and not up yet."""
    if not hasattr(torch.load, "is_bridge"):
        torch.load = _loading(torch.load)
    lazy: Any = type(transformers)
    if not hasattr(lazy.__getattr__, "is_bridge") and not hasattr(transformers, "AutoModelWithLMHead"):
        lazy.__getattr__ = _with_lm_head(lazy.__getattr__)
    model: Any = transformers.PreTrainedModel
    if not hasattr(model.__call__, "is_bridge") and hasattr(model, "set_attn_implementation"):
        model.__call__ = _attending(model.__call__)


def _log(text: str) -> None:
    say_once(f"depass_fast.compat: {text}", logging.WARNING)


def _loading(load: Any) -> Any:
    """Return ``torch.load`` that unpickles what is more than tensors where the script did not say otherwise."""

    @functools.wraps(load)
    def bridged(f: Any, *args: Any, **kwargs: Any) -> Any:
        start = f.tell() if hasattr(f, "tell") else None
        try:
            return load(f, *args, **kwargs)
        except pickle.UnpicklingError as error:
            if kwargs.get("weights_only") is not None or "weights_only" not in str(error):
                raise
            _log(
                "torch.load found more than tensors and unpickles it, as PyTorch did before 2.6 (weights_only=False). "
                "A pickle runs code: load only files that you trust."
            )
            if start is not None:
                f.seek(start)
            return load(f, *args, **{**kwargs, "weights_only": False})

    return _marked(bridged)


def _with_lm_head(getter: Any) -> Any:
    """Return the getter of lazy modules' attributes with `transformers.AutoModelWithLMHead`.

    It is the class' own: importing a model's code can put another module `transformers` in the place of the first.
    """

    @functools.wraps(getter)
    def bridged(self: Any, name: str) -> Any:
        if name != "AutoModelWithLMHead" or self.__name__ != "transformers":
            return getter(self, name)
        _log("transformers.AutoModelWithLMHead is AutoModelForCausalLM, since it is gone.")
        return self.AutoModelForCausalLM

    return _marked(bridged)


def _attending(call: Any) -> Any:
    """Return a model's call that takes eager attention where its probabilities are asked for."""

    @functools.wraps(call)
    def bridged(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = self.config
        asked = kwargs.get("output_attentions")
        asked = getattr(config, "output_attentions", False) if asked is None else asked
        chosen = getattr(config, "_attn_implementation", None)
        if not asked or chosen in ("eager", None):
            return call(self, *args, **kwargs)
        _log(f"output_attentions=True takes eager attention in that call: {chosen} returns no probabilities.")
        self.set_attn_implementation("eager")
        try:
            return call(self, *args, **kwargs)
        finally:
            self.set_attn_implementation(chosen)

    return _marked(bridged)


def _marked(bridged: Any) -> Any:
    bridged.is_bridge = True
    return bridged
