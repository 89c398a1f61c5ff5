"""The Hugging Face model inside the wrappers of other libraries, told by what they have; none of them is imported."""

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

    Wrappers are nnsight's and TransformerLens', PEFT's, whose adapters stay in the layers of the model inside, and
    ``torch.compile``'s, whose original is used.

    Anything else is returned as it is.

    Raises:
        ValueError: the wrapper's weights are not the model's own, or are not loaded; it does more than its weights say.
    """
    while (inner := _inside(model)) is not model:
        if tokenizer is None:
            tokenizer = getattr(model, "tokenizer", None)
        model = inner
    return model, tokenizer


def _inside(model: Any) -> Any:
    name = type(model).__name__
    if any(base.__name__ == "HookedTransformer" for base in type(model).__mro__):
        raise ValueError(
            f"model: {name} holds processed copies of the weights, not the Hugging Face model; give that model itself, "
            "or TransformerLens' TransformerBridge.boot_transformers(...)."
        )
    if type(model).__name__ == "OptimizedModule":  # torch.compile's
        return model._orig_mod
    if _is_peft(model):
        return _without_peft(model)
    if isinstance(model, nn.Module):  # TransformerLens' bridge keeps the model outside of its own modules
        original = vars(model).get("original_model")
        if not isinstance(original, nn.Module):
            if any("_original_component" in module._modules for module in model.modules()):
                raise ValueError("model: it has been put into a TransformerBridge, which rewires it; give the bridge.")
            return model
        if getattr(model, "_weights_processed", False):
            raise ValueError(
                f"model: the weights of this {name} have been processed; without enable_compatibility_mode(), or with "
                "no_processing=True, they are the model's own."
            )
        if any(getattr(model, name, None) for name in ("acts_to_saes", "_acts_to_saes")):
            raise ValueError(
                f"model: dictionaries are spliced into this {name}; remove them first, Features takes one."
            )
        if original not in _BARE:
            _BARE[original] = _bare(original)
            head = _BARE[original].get_output_embeddings()
            if getattr(head, "bias", None) is not None and not head.bias.any():  # the bridge's addition
                vars(head)["_parameters"] = ChainMap({"bias": None}, head._parameters)
        return _BARE[original]
    inner = getattr(model, "_module", None)  # nnsight's envoy
    if not isinstance(inner, nn.Module):
        return model
    if any(p.is_meta for p in inner.parameters()):
        raise ValueError(f"model: the weights of this {name} are not loaded yet; make it with dispatch=True.")
    return inner


def _is_peft(model: Any) -> bool:
    """PEFT's model, or the tuner inside it; not a Hugging Face model that adapters have been added to."""
    return isinstance(model, nn.Module) and any(b.__name__ in _PEFT for b in type(model).__mro__)


def _without_peft(model: Any) -> nn.Module:
    for name, config in model.peft_config.items():
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"model: its adapter {name!r} ({type(config).__name__}) puts vectors of its own before the "
                "prompt, which belong to no token; give the model inside (model.get_base_model()) to leave them out."
            )
    return model.get_base_model() if hasattr(type(model), "get_base_model") else model.model


def _bare(module: nn.Module) -> nn.Module:
    """The same module without the wrappers that a bridge has put around it and every module below.

    Its parameters and buffers are those of the wrapped module, also after they have been replaced there; that stays
    as it is.

    Raises:
        ValueError: a module has a forward of its own, which would lead back into the wrappers.
    """
    while "_original_component" in module._modules:
        module = module._modules["_original_component"]
    if "forward" in vars(module):
        raise ValueError(
            f"model: {type(module).__name__} inside this bridge has had its forward replaced (as accelerate does for a "
            "device_map); give DePass a Hugging Face model of its own."
        )
    bare = copy.copy(module)
    for name, value in vars(module).items():
        if name.endswith("_hooks") or "_hooks_" in name:  # the bridge's, and what is hooked up here is not for it
            vars(bare)[name] = OrderedDict() if isinstance(value, dict) else value
    bare._modules = {name: child if child is None else _bare(child) for name, child in module._modules.items()}
    return bare
