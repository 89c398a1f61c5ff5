"""The Hugging Face model inside other libraries' wrappers. They are recognised by their attributes, not imported."""

from __future__ import annotations

import copy
from collections import ChainMap, OrderedDict
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_BARE: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()  # one per bridged model, so that traces fit
_PEFT = ("PeftModel", "PeftMixedModel", "BaseTuner")


def unwrap(model: Any, tokenizer: Any | None) -> tuple[Any, Any | None]:
    """The model and, unless one is given, the tokenizer inside a wrapper.

    Wrappers are nnsight's, TransformerLens', PEFT's and ``torch.compile``'s. PEFT's adapters stay in the layers of the
    model inside. Anything else is returned as it is.

    Raises:
        ValueError: the wrapper's weights are not the model's own, or are not loaded, or are not all it computes with.
    """
    while (inner := _inside(model)) is not model:
        if tokenizer is None:
            tokenizer = getattr(model, "tokenizer", None)
        model = inner
    return model, tokenizer


def _inside(model: Any) -> Any:
    """The model inside the outermost wrapper, or the model itself where there is none."""
    if _is_hooked(model):
        raise ValueError(
            f"model: {type(model).__name__} holds processed copies of the weights, not the Hugging Face model; give "
            "that model itself, or TransformerLens' TransformerBridge.boot_transformers(...)."
        )
    if type(model).__name__ == "OptimizedModule":  # torch.compile's
        return model._orig_mod
    if _is_peft(model):
        return _without_peft(model)
    return _inside_bridge(model) if isinstance(model, nn.Module) else _inside_envoy(model)


def _is_hooked(model: Any) -> bool:
    """True for TransformerLens' HookedTransformer."""
    return any(base.__name__ == "HookedTransformer" for base in type(model).__mro__)


def _inside_bridge(model: nn.Module) -> nn.Module:
    """The model inside TransformerLens' bridge, which keeps it outside of its own modules; else the module itself."""
    name, original = type(model).__name__, vars(model).get("original_model")
    if not isinstance(original, nn.Module):
        if any("_original_component" in module._modules for module in model.modules()):
            raise ValueError("model: it has been put into a TransformerBridge, which rewires it; give the bridge.")
        return model
    if getattr(model, "_weights_processed", False):
        raise ValueError(
            f"model: the weights of this {name} have been processed; without enable_compatibility_mode(), or with "
            "no_processing=True, they are the model's own."
        )
    if any(getattr(model, spliced, None) for spliced in ("acts_to_saes", "_acts_to_saes")):
        raise ValueError(f"model: dictionaries are spliced into this {name}; remove them first, Features takes one.")
    if original not in _BARE:
        _BARE[original] = _bare_model(original)
    return _BARE[original]


def _bare_model(original: nn.Module) -> nn.Module:
    """The model of a bridge without its wrappers, and without the zero bias that the bridge adds to the unembedding."""
    bare: Any = _bare(original)
    head = bare.get_output_embeddings()
    if getattr(head, "bias", None) is not None and not head.bias.any():
        vars(head)["_parameters"] = ChainMap({"bias": None}, head._parameters)
    return bare


def _inside_envoy(model: Any) -> Any:
    """The module inside nnsight's envoy; anything else is returned as it is."""
    inner = getattr(model, "_module", None)
    if not isinstance(inner, nn.Module):
        return model
    if any(p.is_meta for p in inner.parameters()):
        name = type(model).__name__
        raise ValueError(f"model: the weights of this {name} are not loaded yet; make it with dispatch=True.")
    return inner


def _is_peft(model: Any) -> bool:
    """True for PEFT's model or the tuner inside it, not for a Hugging Face model that adapters have been added to."""
    return isinstance(model, nn.Module) and any(b.__name__ in _PEFT for b in type(model).__mro__)


def _without_peft(model: Any) -> nn.Module:
    """The model that PEFT has wrapped, its adapters in its layers."""
    for name, config in model.peft_config.items():
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"model: its adapter {name!r} ({type(config).__name__}) puts vectors of its own before the "
                "prompt, which belong to no token; give the model inside (model.get_base_model()) to leave them out."
            )
    return model.get_base_model() if hasattr(type(model), "get_base_model") else model.model


def _bare(module: nn.Module) -> nn.Module:
    """The same module without the wrappers that a bridge has put around it and every module below.

    It shares the parameters and buffers of the wrapped module, also after they have been replaced there. The wrapped
    module stays as it is.

    Raises:
        ValueError: a module has a forward of its own, which would lead back into the wrappers.
    """
    while (wrapped := module._modules.get("_original_component")) is not None:
        module = wrapped
    if "forward" in vars(module):
        raise ValueError(
            f"model: {type(module).__name__} inside this bridge has had its forward replaced (as accelerate does for a "
            "device_map); give DePass a Hugging Face model of its own."
        )
    bare = copy.copy(module)
    for name, value in vars(module).items():
        if name.endswith("_hooks") or "_hooks_" in name:  # hooks of the bridge, which must not see ours
            vars(bare)[name] = OrderedDict() if isinstance(value, dict) else value
    bare._modules = {name: child if child is None else _bare(child) for name, child in module._modules.items()}
    return bare
