"""Mixtures of experts: the router is frozen, so that an expert is an MLP on the positions that were sent to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from .family import Experts
from .stored import Stacked
from .weights import Linear, Mlp


@dataclass(frozen=True)
class Routed:
    """What expert ``index`` of a layer did: at ``positions`` (P,), None for all, its gates and activations (P, I)."""

    index: int
    positions: Tensor | None
    gate: Tensor
    act: Tensor


def has_router(mlp: nn.Module, experts: Experts) -> bool:
    """Whether this MLP is a mixture: families mix sparse and dense layers."""
    return hasattr(mlp, experts.experts) and hasattr(mlp, experts.router)


def expert_mlps(mlp: nn.Module, experts: Experts, branch: dict[str, Any]) -> tuple[Mlp, ...]:
    """Every expert of a layer, the shared one last."""
    return tuple(Mlp(**branch, gate=part.gate, down=part.down, name=part.name) for part in _projections(mlp, experts))


def expert_modules(mlp: nn.Module, experts: Experts) -> list[nn.Module | Stacked]:
    """What holds the weights of all experts."""
    return [linear.module for part in _projections(mlp, experts) for linear in (part.gate, part.up, part.down)]


def route(mlp: nn.Module, experts: Experts, x: Tensor, routing: Any) -> list[Routed]:
    """What the experts did with normed states ``x`` (T, D), given the router's output. Who got nothing is left out."""
    weights, chosen = _routing(experts, routing, x.dtype)
    done = []
    for index, part in enumerate(_projections(mlp, experts)):
        if part.name == "shared":
            positions, share = None, 1.0
            if experts.shared_gate is not None:
                share = torch.sigmoid(attrgetter(experts.shared_gate)(mlp)(x))
            inputs = x
        else:
            positions, rank = (chosen == index).nonzero(as_tuple=True)
            if not len(positions):
                continue
            inputs, share = x[positions], weights[positions, rank, None]
        gate, up = (_projected(linear, inputs) for linear in (part.gate, part.up))
        done.append(Routed(index, positions, gate, (part.activation(gate) * up * share).to(x.dtype)))
    return done


def _projected(linear: Linear, x: Tensor) -> Tensor:
    """In x's dtype; weights that are computed (dequantised, or with an adapter's part) may be wider."""
    weight, bias = linear.weight, linear.bias
    return nn.functional.linear(x.to(weight), weight, None if bias is None else bias.to(weight)).to(x)


@dataclass(frozen=True)
class _Projections:
    name: str
    gate: Linear
    up: Linear
    down: Linear
    activation: Any


def _projections(mlp: nn.Module, experts: Experts) -> Iterator[_Projections]:
    held = attrgetter(experts.experts)(mlp)
    if not isinstance(held, nn.ModuleList) and not hasattr(held, "down_proj"):
        raise ValueError(f"model: its experts are wrapped by {type(held).__name__}; merge the adapter into them first.")
    if isinstance(held, nn.ModuleList):
        modules = [(f"E{index}", module) for index, module in enumerate(held)]
    else:
        modules = []
        for index in range(len(held.down_proj)):
            both = Stacked(held.gate_up_proj, index)
            gate, up = (Linear(both, lambda w, half=half: w.chunk(2)[half]) for half in (0, 1))
            yield _Projections(f"E{index}", gate, up, Linear(Stacked(held.down_proj, index)), held.act_fn)
    if experts.shared is not None:
        modules.append(("shared", attrgetter(experts.shared)(mlp)))
    for name, module in modules:
        gate, up, down = (Linear(attrgetter(path)(module)) for path in (experts.gate, experts.up, experts.down))
        yield _Projections(name, gate, up, down, module.act_fn)


def _routing(experts: Experts, routing: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights (T, K) and indices (T, K) of the chosen experts: the router's own, or made of its logits."""
    if isinstance(routing, tuple):
        _, weights, chosen = routing
        return weights, chosen
    weights, chosen = torch.topk(routing.softmax(-1, dtype=torch.float), experts.top_k, dim=-1)
    if experts.normalised:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(dtype), chosen
