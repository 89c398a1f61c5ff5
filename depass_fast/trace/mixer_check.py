"""The check of a recurrence in half precision: the model's own code once more, in float32.

A recurrence adds up its rounding. In half precision what the model's heads give may therefore be far from what they
should be, and a comparison with them sees no small fault. So a copy of the mixer computes in float32 what it makes of
the outputs that its projections have given in half. That is also what a trace computes: both agree to a few roundings.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.precision import full_precision

_PLAIN = (type(None), bool, int, float, str)


class _Given(nn.Module):
    """A projection that has given its output, (1, T, C), already."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output
        self.weight, self.bias = output.new_empty(0), None  # code may ask for their device

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.output


class _Heads(nn.Module):
    """A projection of heads that keeps what it is given, and ends the call."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.given: Tensor | None = None
        self.weight, self.bias = torch.empty(0, device=device), None

    def forward(self, heads: Tensor) -> Tensor:
        self.given = heads
        raise _Ended


class _Ended(Exception):
    pass


def heads_in_float32(
    mixer: nn.Module, outputs: dict[nn.Module, Tensor], last: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> Tensor | None:
    """Return what a mixer gives its ``last`` projection, (T, H·d), where all of it is computed in float32.

    ``outputs`` are those of its projections, (T, C) each, which are not called again. The mixer was called with
    ``args`` and ``kwargs``. None is returned where that call cannot be repeated: it had a cache, or its code or its
    weights are for half precision alone.
    """
    if not all(_repeats(x) for x in (*args, *kwargs.values())):
        return None
    heads = _Heads(next(iter(outputs.values())).device)
    replaced: dict[nn.Module, nn.Module] = {one: _Given(x.float()[None]) for one, x in outputs.items()}
    try:
        with torch.no_grad(), full_precision():
            again = _copied(mixer, {**replaced, last: heads})
            again(*map(_wide, args), **{name: _wide(x) for name, x in kwargs.items()})
    except _Ended:
        assert heads.given is not None
        return heads.given.flatten(0, -2) if heads.given.dtype == torch.float32 else None
    except Exception:  # of a fork's code, or of kernels: the comparison in half precision is left
        return None
    return None


def _repeats(x: Any) -> bool:
    return all(map(_repeats, x)) if isinstance(x, (tuple, list)) else isinstance(x, (*_PLAIN, Tensor))


def _wide(x: Any) -> Any:
    if isinstance(x, (tuple, list)):
        return type(x)(map(_wide, x))
    return x.detach().float() if isinstance(x, Tensor) and x.is_floating_point() else x


def _copied(module: nn.Module, replaced: dict[nn.Module, nn.Module]) -> Any:
    """A copy of a module in float32, with others in the place of some parts, and without hooks."""
    if module in replaced:
        return replaced[module]
    new = copy.copy(module)
    state = {name: OrderedDict() if name.endswith("_hooks") else x for name, x in vars(module).items()}
    state.pop("forward", None)  # of its own: it would call the module that is copied
    state["_parameters"] = {
        name: None if x is None else nn.Parameter(_wide(x), requires_grad=False)
        for name, x in module._parameters.items()
    }
    state["_buffers"] = {name: _wide(x) for name, x in module._buffers.items()}
    state["_modules"] = {
        name: None if part is None else _copied(part, replaced) for name, part in module._modules.items()
    }
    new.__dict__ = state
    return new
