"""Weights stored in 8 or 4 bit, dequantised by their own libraries. Modules are recognised by their attributes.

A weight is dequantised when it is read, and kept as long as its layer is worked on. The forward pass of such a model
may round more than its weights (8-bit activations). That error is the model's own: it shows in the completeness of a
result, never in a component.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


def is_quantised(module: Any) -> bool:
    """True if this module's weight is stored in a form that can be dequantised."""
    return _reader(module) is not None


def dequantised(module: Any) -> Tensor:
    """The weight of a quantised linear module, (out, in)."""
    with torch.no_grad():
        return _reader(module)(module).detach()


def _reader(module: Any) -> Any:
    """The function that dequantises a module's weight, or None where it is not quantised."""
    weight: Any = getattr(module, "weight", None)
    kind = type(weight).__name__
    if kind == "Params4bit" and getattr(weight, "quant_state", None) is not None:
        return _bitsandbytes_4bit
    if kind == "Int8Params" and weight.dtype == torch.int8:
        return _bitsandbytes_8bit
    if hasattr(module, "weight_qtype") and getattr(module, "qweight", None) is not None:
        return lambda m: m.qweight.dequantize()  # quanto, also before it is frozen
    if isinstance(weight, Tensor) and type(weight) not in _PLAIN and type(weight).dequantize is not Tensor.dequantize:
        return lambda m: m.weight.dequantize()  # torchao, and other tensors that dequantise themselves
    if hasattr(module, "W_q") and hasattr(module, "dequantize"):
        return lambda m: m.dequantize()  # HQQ
    if hasattr(module, "qweight") and hasattr(module, "dequantize_weight"):
        return lambda m: m.dequantize_weight().T  # GPTQ, which stores (in, out)
    if hasattr(getattr(module, "compressor", None), "decompress_module") and not _is_numbers(weight):
        return lambda m: m.compressor.decompress_module(m)  # compressed-tensors
    return None


def _is_numbers(weight: Any) -> bool:
    return isinstance(weight, Tensor) and weight.is_floating_point() and weight.element_size() >= 2


def _bitsandbytes_4bit(module: Any) -> Tensor:
    import bitsandbytes  # pyright: ignore[reportMissingImports]  # there if such a module is

    weight, state = module.weight, module.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):  # repacked for this processor: the module is asked
        one = torch.eye(module.in_features, dtype=torch.float32, device=weight.device)
        out = module.forward(one)
        return (out if module.bias is None else out - module.bias).T
    return bitsandbytes.functional.dequantize_4bit(weight.data, state)


def _bitsandbytes_8bit(module: Any) -> Tensor:
    import bitsandbytes  # pyright: ignore[reportMissingImports]  # there if such a module is

    scale = module.weight.SCB if module.weight.SCB is not None else module.state.SCB  # moves at the first forward pass
    return bitsandbytes.functional.int8_vectorwise_dequant(module.weight.data, scale)
