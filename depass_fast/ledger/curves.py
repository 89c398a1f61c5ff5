"""The activations that the kernel of the way back knows, told by their classes and functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..adapters import Mlp
from .norms import has_kernels

_CURVES = {
    **dict.fromkeys(("SiLU", "SiLUActivation", "silu"), "silu"),
    **dict.fromkeys(("GELUActivation", "gelu"), "gelu"),
    **dict.fromkeys(("GELUTanh", "PytorchGELUTanh", "NewGELUActivation", "FastGELUActivation"), "gelu_tanh"),
    **dict.fromkeys(("ReLU", "relu"), "relu"),
}


def kernel_curve(
    rule: str, weights: Mlp, constants: Sequence[Tensor | None], device: torch.device, *dtypes: torch.dtype
) -> str | None:
    """Return the name by which the kernel knows an MLP's activation; None where the plain code has to do the MLP.

    ``dtypes`` are those of the products, of the gradients and of the trace. The kernel knows no ``constants`` in front
    of the activation, no limits and no code of a user's.
    """
    activation = weights.activation
    if rule == "taylor" or activation is None or not has_kernels(device, *dtypes):
        return None
    if weights.follows or activation.sparsity:  # its activations have factors, or thresholds, of their own
        return None
    changed = activation.gate_limit, activation.up_limit, activation.up_offset or None, *constants
    if any(one is not None for one in changed):
        return None
    return curve_name(activation.curve)


def curve_name(curve: Callable[[Tensor], Tensor]) -> str | None:
    """Return the name by which the kernel knows an activation; None for a user's own, and for one that it lacks."""
    if isinstance(curve, nn.GELU):
        return "gelu_tanh" if curve.approximate == "tanh" else "gelu"
    if isinstance(curve, nn.Module):
        own = "forward" in vars(curve) or curve._forward_hooks or curve._forward_pre_hooks
        name, home = type(curve).__name__, type(curve).__module__
    else:
        own, name, home = False, getattr(curve, "__name__", ""), getattr(curve, "__module__", None) or ""
    return _CURVES.get(name) if home.startswith(("torch", "transformers")) and not own else None
