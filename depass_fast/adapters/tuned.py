"""Linear modules that PEFT has wrapped, recognised by their attributes; PEFT is not imported.

A wrapped module computes with its base layer's weight plus the additions of its active adapters: scaling · B · A for
LoRA, and the same renormalised to learned lengths of its rows for DoRA. Every kind of adapter that has PEFT's
``get_delta_weight`` is read by it (LoRA, LoHa, LoKr, AdaLoRA, VeRA, ...).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_MERGE = "merge the adapter into the model first (model.merge_and_unload())."


def modules_of(module: nn.Module) -> list[nn.Module]:
    """All modules below one and itself, each once, in the order of `modules()`; that takes several times as long."""
    found, waiting = {}, [module]
    while waiting:
        one = waiting.pop()
        if one not in found:
            found[one] = None
            waiting += [child for child in reversed(list(one._modules.values())) if child is not None]
    return list(found)


def parameters_of(module: nn.Module) -> list[nn.Parameter]:
    """All parameters of a module and of those below it, each once, in the order of `parameters()`."""
    every = (one for each in modules_of(module) for one in each._parameters.values() if one is not None)
    return list({id(one): one for one in every}.values())


def is_tuned(module: Any) -> bool:
    """True for a base layer with PEFT's adapters around it."""
    return isinstance(module, nn.Module) and "base_layer" in module._modules and hasattr(module, "active_adapters")


def inside(found: Any) -> Any:
    """The module that does the work: inside a compiled one, or the copy in use of a `modules_to_save`."""
    while isinstance(found, nn.Module):
        module: Any = found
        if "_orig_mod" in module._modules:
            found = module._modules["_orig_mod"]
        elif "modules_to_save" in module._modules and "original_module" in module._modules:
            copies = module.modules_to_save
            used = [] if module.disable_adapters else [a for a in module.active_adapters if a in copies]
            found = copies[used[0]] if used else module.original_module
        else:
            break
    return found


def tuning(model: nn.Module) -> tuple:
    """The adapters at work in a model, and their scales: this differs whenever they have changed the weights."""
    tuned: list[Any] = [module for module in modules_of(model) if is_tuned(module)]
    return tuple(
        (m.merged, m.disable_adapters, tuple(m.active_adapters), tuple(dict(getattr(m, "scaling", {})).items()))
        for m in tuned
    )


def active_adapters(model: nn.Module) -> list[str]:
    """The names of the adapters that are added to a model's weights or merged into them, in order."""
    tuned: list[Any] = [module for module in modules_of(model) if is_tuned(module)]
    return sorted({name for m in tuned for name in (*at_work(m), *(m.merged_adapters if m.merged else ()))})


def reparametrised(model: nn.Module) -> list[Tensor]:
    """The parameters that PEFT replaces in every forward pass (`target_parameters`), which writes to them."""
    tuned: list[Any] = [module for module in modules_of(model) if is_tuned(module)]
    return [module.get_param() for module in tuned if hasattr(module, "parameter_name")]


def tuned_weight(module: Any, base: Tensor) -> Tensor:
    """The weight (out, in) that a wrapped module computes with; ``base`` is the weight of its base layer.

    It is in float32 at least: an adapter's part may be smaller than the rounding of the base in half precision.

    Raises:
        ValueError: an adapter's addition has another shape.
    """
    names = at_work(module)
    if not names:
        return base
    base = base.to(torch.promote_types(base.dtype, torch.float32))
    weight = base.clone()
    for name in names:
        try:
            delta = module.get_delta_weight(name).detach().to(base)
        except (TypeError, AttributeError):  # some kinds mean something else by this method
            delta = base.new_zeros(0)
        delta = delta.T if getattr(module, "fan_in_fan_out", False) else delta
        if delta.shape != base.shape:
            raise ValueError(f"{type(module).__name__} does not add to its weight (adapter {name!r}); {_MERGE}")
        if name in getattr(module, "lora_magnitude_vector", ()):  # DoRA, arXiv 2402.09353 equation 5
            tuned = base + delta
            lengths = module.lora_magnitude_vector[name].weight.detach().to(base).flatten()
            delta = tuned * (lengths / tuned.norm(dim=1))[:, None] - base
        weight += delta
    return weight


def tuned_bias(module: Any, base: Tensor | None) -> Tensor | None:
    """The bias (out,) of a wrapped module, or None."""
    for name in at_work(module):
        b = getattr(module.lora_B[name], "bias", None) if name in getattr(module, "lora_B", ()) else None
        if b is not None:
            b = b.detach() * module.scaling[name]
            base = b if base is None else base + b.to(base)
    return base


def why_unreadable(module: Any) -> str | None:
    """The reason why a wrapped module's weight cannot be computed; None if it can."""
    kind = type(module).__name__
    if module.merged and module.disable_adapters:
        return "its adapters are merged and disabled at once; unmerge them first (model.unmerge_adapter())."
    names = at_work(module)
    if names and not hasattr(module, "get_delta_weight"):
        return f"{kind} changes what it computes otherwise than by adding to its weight; {_MERGE}"
    for name in names:
        variant = type(getattr(module, "lora_variant", {}).get(name)).__name__
        if variant != "NoneType" and not variant.startswith("Dora"):
            return f"{kind} holds the adapter {name!r} of a kind ({variant}) that is not one weight; {_MERGE}"
    return None


def at_work(module: Any) -> list[str]:
    """The adapters that the forward pass of a wrapped module adds to its base layer."""
    if module.disable_adapters or module.merged:
        return []
    homes = [getattr(module, name, ()) for name in module.adapter_layer_names]
    return [name for name in module.active_adapters if any(name in home for home in homes)]
