"""Weights as numbers, however a module stores them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .quantised import dequantised, is_quantised
from .tuned import at_work, is_tuned, tuned_bias, tuned_weight, why_unreadable

_ROUNDING = ("BitLinear", "AutoBitLinear")  # BitNet's, of transformers' integration


@dataclass(frozen=True, eq=False)
class Stacked:
    """One expert's matrix within a tensor of all experts, (E, out, in), as if it were a linear module.

    ``biases`` are (E, out), or None. With ``transposed`` the tensor is (E, in, out). With ``count``, the number of
    experts, their matrices lie one below another in it: (E·out, in).
    """

    stack: Tensor
    index: int
    biases: Tensor | None = None
    transposed: bool = False
    count: int | None = None

    @property
    def weight(self) -> Tensor:
        stack = self.stack if self.count is None else self.stack.unflatten(0, (self.count, -1))
        weight = stack[self.index]
        return weight.T if self.transposed else weight

    @property
    def bias(self) -> Tensor | None:
        return None if self.biases is None else self.biases[self.index]


def stored_weight(module: Any) -> Tensor:
    """The weight of a linear module, (out, in): a view of the model's own wherever that is plain.

    The weight of a quantised module, or of one that PEFT has wrapped, is computed at every call.
    """
    if is_tuned(module):
        return tuned_weight(module, stored_weight(module.base_layer))
    if is_quantised(module):
        return dequantised(module)
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def stored_bias(module: Any) -> Tensor | None:
    """The bias (out,) of a module, or None."""
    if is_tuned(module):
        return tuned_bias(module, stored_bias(module.base_layer))
    return getattr(module, "bias", None)


def stored_shape(module: Any) -> tuple[int, int]:
    """(out, in) of a linear module, without reading its weight."""
    if is_tuned(module):
        return stored_shape(module.base_layer)
    if is_quantised(module):
        return module.out_features, module.in_features
    out, size = (module.weight.T if isinstance(module, Conv1D) else module.weight).shape
    return out, size


def stored_device(module: nn.Module | Stacked) -> torch.device:
    """The device of a linear module."""
    if isinstance(module, Stacked):
        return module.stack.device
    return next(chain(module.parameters(), module.buffers())).device


def unreadable(module: Any) -> str | None:
    """The reason why the weight of a module cannot be read as numbers; None if it can."""
    if is_tuned(module):
        return why_unreadable(module) or unreadable(module.base_layer)
    if is_quantised(module):
        return None
    if type(module).__name__ in _ROUNDING:
        return (
            f"{type(module).__name__} rounds its weight to three values and its input to 8 bits in every forward pass, "
            "which no frozen number undoes; load the master weights (-bf16) without quantization_config."
        )
    weight = getattr(module, "weight", None)
    if isinstance(module, Stacked):
        weight = module.stack  # of all experts: no need to look at each
    elif weight is not None and any(module.children()):
        parts = ", ".join(name for name, _ in module.named_children())
        return (
            f"{type(module).__name__} wraps its weight (it holds {parts}), which is not all it computes with; "
            "merge the adapter into the model first."
        )
    elif weight is None and not [*module.parameters(), *module.buffers()]:
        return None  # a norm without parameters
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.element_size() < 2:
        kind = getattr(weight, "dtype", type(weight).__name__)
        return (
            f"its weight is quantised ({kind}) and cannot be read as numbers; load the model in float32, "
            "bfloat16 or float16, or dequantise it first (model.dequantize())."
        )
    return "its weight is offloaded (meta device); load the model into memory." if weight.is_meta else None


def kind_of(module: Any) -> tuple | None:
    """A key that is equal for modules whose weights are read in the same way; None where the weight is plain."""
    if is_tuned(module):
        return (type(module), *at_work(module), kind_of(module.base_layer))
    return (type(module), type(getattr(module, "weight", None))) if is_quantised(module) else None


def reads_as_computed(module: nn.Module, dtype: torch.dtype) -> float:
    """The relative difference of a module's output on random input from the product with the weight that is read.

    It is about 0.01 for a module with 8-bit activations.
    """
    weight, bias = stored_weight(module), stored_bias(module)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, weight.shape[1], generator=generator, device="cpu").to(weight.device, dtype)
    with torch.no_grad():
        own = module.forward(x)
        ours = nn.functional.linear(x.to(weight), weight, None if bias is None else bias.to(weight))
    return float((own.to(ours) - ours).norm() / ours.norm().clamp_min(torch.finfo(ours.dtype).tiny))
