"""Linear modules that PEFT has wrapped, told by what they have; PEFT is not imported.

A wrapped module computes with its base layer's weight and with what its active adapters add to it: scaling · B · A for
LoRA, and the same renormalised to learned lengths of its rows for DoRA. Whatever says what it adds by PEFT's
``get_delta_weight`` is read in that way (LoRA, LoHa, LoKr, AdaLoRA, VeRA, ...).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_MERGE = "merge the adapter into the model first (model.merge_and_unload())."


def is_tuned(module: Any) -> bool:
    """Whether this is a base layer with PEFT's adapters around it."""
    return isinstance(module, nn.Module) and "base_layer" in module._modules and hasattr(module, "active_adapters")


def inside(module: Any) -> Any:
    """The module that does the work inside a compiled one, or of a `modules_to_save` the copy in use."""
    while isinstance(module, nn.Module):
        if "_orig_mod" in module._modules:
            module = module._modules["_orig_mod"]
        elif "modules_to_save" in module._modules and "original_module" in module._modules:
            copies = module.modules_to_save
            used = [] if module.disable_adapters else [a for a in module.active_adapters if a in copies]
            module = copies[used[0]] if used else module.original_module
        else:
            break
    return module


def tuning(model: nn.Module) -> tuple:
    """Which adapters are at work in a model, and how strongly: differs whenever its weights have changed by that."""
    return tuple(
        (m.merged, m.disable_adapters, tuple(m.active_adapters), tuple(dict(getattr(m, "scaling", {})).items()))
        for m in model.modules()
        if is_tuned(m)
    )


def reparametrised(model: nn.Module) -> list[Tensor]:
    """Parameters that PEFT takes the place of in every forward pass (`target_parameters`), which writes to them."""
    return [m.get_param() for m in model.modules() if is_tuned(m) and hasattr(m, "parameter_name")]


def tuned_weight(module: Any, base: Tensor) -> Tensor:
    """The weight (out, in) that a wrapped module computes with, ``base`` being that of its base layer.

    In float32 at least: an adapter's part may be smaller than the rounding of the base in half precision.

    Raises:
        ValueError: what an adapter says that it adds has another shape.
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
    """Why a wrapped module's weight cannot be told, if it cannot."""
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
