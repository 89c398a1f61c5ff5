"""Mixtures of experts: the router is frozen, so that an expert is an MLP on the positions that were sent to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..runtime.transfer import to_host
from .activation import Activation
from .chained import Chained
from .family import Experts, Path, first_half, second_half
from .maps import Linear
from .paths import below, exists, name_of
from .same import UNCHANGED, Same
from .stored import Stacked
from .weights import SAME, Mlp


@dataclass(frozen=True)
class RoutedExpert:
    """The work of one expert, the layer's MLP number ``part``: gates and activations (P, I) at ``positions`` (P,).

    ``positions`` is None for all. ``router_weight`` (P,) is the factor of its output, which the
    activations hold; ``input_weight`` (P,) that of what it reads, if there is one.
    """

    part: int
    positions: Tensor | None
    host_positions: np.ndarray | None  # the same in host memory
    gate: Tensor
    act: Tensor
    router_weight: Tensor
    input_weight: Tensor | None = None


def has_router(block: nn.Module, experts: Experts) -> bool:
    """True if the MLP of this layer is a mixture: families mix sparse and dense layers."""
    return exists(block, experts.experts) and exists(block, experts.router)


def expert_mlps(block: nn.Module, experts: Experts, branch: dict[str, Any]) -> tuple[Mlp, ...]:
    """Every expert of a layer, the shared one last."""
    parts = _projections(block, experts)
    return tuple(
        Mlp(**branch, gate=part.gate, down=part.down, name=part.name, up=part.up, activation=part.activation)
        for part in parts
    )


def expert_modules(block: nn.Module, experts: Experts) -> list[nn.Module | Stacked]:
    """The modules, or stacked tensors, that hold the weights of all experts."""
    modules: list[nn.Module | Stacked] = (
        [] if experts.latent is None else [below(block, path) for path in experts.latent]
    )
    for part in _projections(block, experts):
        if part.name != SAME:
            modules += [linear.module for linear in (part.gate, part.up, part.down) if linear is not None]
    return modules


def watch_router(block: nn.Module, experts: Experts, note: Callable[[Tensor, Tensor], None]) -> Callable[[], None]:
    """Have ``note`` called with weights and indices (T, K) of the chosen experts. Returns the function to undo it."""
    held, router = below(block, experts.experts), below(block, experts.router)
    whole = isinstance(held, nn.ModuleList) or router in held.children()  # is `held`: nothing is handed to it
    if not whole and not experts.weighs_input and experts.always is None:

        def handed(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
            note(*_choice((*args, *kwargs.values()), experts.dense))
            return _as_wide(args, kwargs)

        return held.register_forward_pre_hook(handed, with_kwargs=True).remove

    def returned(module: nn.Module, args: tuple, output: Any) -> None:
        if experts.decide is not None:
            note(*experts.decide(block, output))
        elif isinstance(output, tuple):
            note(*_choice(output, experts.dense))
        else:
            note(*softmax_top_k(output, experts.top_k, experts.normalised))

    return router.register_forward_hook(returned).remove


def softmax_top_k(logits: Tensor, k: int, normalised: bool) -> tuple[Tensor, Tensor]:
    """Weights and indices (T, K) of the K largest entries of a softmax over logits (T, E)."""
    weights, chosen = torch.topk(logits.softmax(-1, dtype=torch.float), k, dim=-1)
    if normalised:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(logits.dtype), chosen


@dataclass(frozen=True)
class ExpertAssignment:
    """The positions that one layer's router sent to its experts, sorted by expert and then by position; (T · K,) each.

    ``order`` holds their places in the flattened indices (T, K).
    """

    order: Tensor
    positions: Tensor
    host_positions: np.ndarray
    host_experts: np.ndarray

    def of_expert(self, expert: int) -> slice:
        """The entries of one expert."""
        return slice(*np.searchsorted(self.host_experts, (expert, expert + 1)).tolist())


def sort_choices(chosen: Sequence[Tensor]) -> list[ExpertAssignment]:
    """The assignments that the indices (T, K) of every layer stand for. The device is waited for once."""
    found = [layer.flatten().sort(stable=True) for layer in chosen]
    positions = [order // layer.shape[1] for (_, order), layer in zip(found, chosen, strict=True)]
    host = [x.numpy() for x in to_host([*positions, *(experts for experts, _ in found)])]
    return [ExpertAssignment(found[i].indices, positions[i], host[i], host[i + len(found)]) for i in range(len(found))]


def route(
    block: nn.Module, experts: Experts, x: Tensor, weights: Tensor, assignment: ExpertAssignment
) -> list[RoutedExpert]:
    """Recompute what the experts did with normed states ``x`` (T, D). Experts without a position are left out.

    ``weights`` (T, K) are :func:`watch_router`'s, in the dtype that the router computes in. Results are in x's dtype.
    """
    done, weights = [], weights.flatten()[assignment.order, None]
    for index, part in enumerate(_projections(block, experts)):
        if part.name == "shared":
            positions, on_host, inputs, weight = None, None, x, x.new_full((len(x), 1), experts.factor)
            if experts.shared_gate is not None:
                weight = weight * torch.sigmoid(below(block, experts.shared_gate)(x))
        elif part.name == SAME:
            positions, on_host, inputs = None, None, x
            wide = weights.to(torch.promote_types(weights.dtype, x.dtype))
            weight = _weight_behind(index, wide, assignment, len(x)) * (experts.factor * experts.routed_factor)
        else:
            here = assignment.of_expert(index)
            if here.start == here.stop:
                continue
            positions, on_host = assignment.positions[here], assignment.host_positions[here]
            factor = experts.factor * experts.routed_factor
            inputs, weight = x[positions], weights[here] * factor
        of_input = None
        if experts.weighs_input and positions is not None:
            of_input, weight = weights[here].to(x.dtype), torch.full_like(weight, factor)
            inputs = inputs * of_input
        gate, up = part.gate.project(inputs), None if part.up is None else part.up.project(inputs)
        act, of_input = (part.activation(gate, up) * weight).to(x.dtype), None if of_input is None else of_input[:, 0]
        done.append(RoutedExpert(index, positions, on_host, gate, act, weight.flatten().to(x.dtype), of_input))
    return done


def _weight_behind(expert: int, weights: Tensor, assignment: ExpertAssignment, n_positions: int) -> Tensor:
    """The sum of every position's weights (T, 1) of experts from a number on; ``weights`` are in their order."""
    first = int(np.searchsorted(assignment.host_experts, expert))
    total = weights.new_zeros(n_positions, 1)
    return total.index_add_(0, assignment.positions[first:], weights[first:])


def _choice(values: tuple, dense: bool = False) -> tuple[Tensor, Tensor]:
    """Weights and indices (T, K) among the values that the model passes on: the last floats, and the only integers.

    Weights of all experts (T, E) are taken at the indices. Where all experts are chosen, only ``dense`` tells them
    apart from weights of the chosen ones.
    """
    (chosen,) = (x for x in values if not x.is_floating_point())
    *_, weights = (x for x in values if x.is_floating_point())
    return (weights.gather(1, chosen) if dense or weights.shape != chosen.shape else weights), chosen


def _as_wide(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """The arguments of experts with float64 in the place of float32, where they have both; None: as they are.

    Some sum up in the dtype of their weights (Nemotron-H), so that a float64 model would round in float32.
    """
    both = {x.dtype for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()}
    if both != {torch.float32, torch.float64}:
        return None
    wide = lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x  # noqa: E731
    return tuple(map(wide, args)), {name: wide(x) for name, x in kwargs.items()}


@dataclass(frozen=True)
class _Projections:
    name: str
    gate: Linear
    up: Linear | None
    down: Linear
    activation: Activation


def _projections(block: nn.Module, experts: Experts) -> Iterator[_Projections]:
    held = below(block, experts.experts)
    if isinstance(held, nn.ModuleList):
        yield from (_of_module(f"E{index}", module, experts) for index, module in enumerate(held))
    else:
        yield from (_through_latent(part, block, experts) for part in _of_stacks(held, experts))
        if experts.always is not None:
            yield from _always(below(block, experts.always), experts, len(below(held, experts.stacks[1])))
        if experts.gives_back:
            down = Same(Stacked(*_stack(held, experts.stacks[1])[:1], 0, None, experts.transposed))
            yield _Projections(SAME, down, None, down, UNCHANGED)
    if experts.shared is not None and exists(block, experts.shared):
        shared = _of_module("shared", below(block, experts.shared), experts)
        if shared.down.shape[1] > 0:  # DeepSeek without shared experts has an empty one
            yield shared


def _of_module(name: str, module: nn.Module, experts: Experts) -> _Projections:
    if experts.fused:
        gate, up = (Linear(below(module, experts.gate), half) for half in (first_half, second_half))
    else:
        gate = Linear(below(module, experts.gate))
        up = None if experts.up is None else Linear(below(module, experts.up))
    return _Projections(name, gate, up, Linear(below(module, experts.down)), _activation(module, experts))


def _of_stacks(held: nn.Module, experts: Experts) -> Iterator[_Projections]:
    if not all(exists(held, path) and isinstance(below(held, path), Tensor) for path in experts.stacks):
        raise ValueError(
            f"model: its experts are held by {type(held).__name__}, and not as tensors; merge the adapter into them "
            "first, or dequantise them (MXFP4: Mxfp4Config(dequantize=True))."
        )
    if experts.flat is not None:
        yield from _of_flat_stacks(held, experts, experts.flat)
        return
    (gate_up, gate_up_bias), (down, down_bias) = (_stack(held, path) for path in experts.stacks)
    halves = (_even, _odd) if experts.interleaved else (first_half, second_half)
    activation = _activation(held, experts)
    for index in range(len(down)):
        both = Stacked(gate_up, index, gate_up_bias, experts.transposed)
        gate, up = (Linear(both, half) for half in halves) if experts.up is not None else (Linear(both), None)
        wide = Linear(Stacked(down, index, down_bias, experts.transposed))
        yield _Projections(f"E{index}", gate, up, wide, activation)


def _of_flat_stacks(held: nn.Module, experts: Experts, count: int) -> Iterator[_Projections]:
    stacks, activation = [below(held, path) for path in experts.stacks], _activation(held, experts)
    for index in range(count):
        gate, up, down = (
            Linear(Stacked(stack, index, None, transposed, count))
            for stack, transposed in zip(stacks, (False, False, True), strict=True)
        )
        yield _Projections(f"E{index}", gate, up, down, activation)


def _through_latent(part: _Projections, block: nn.Module, experts: Experts) -> _Projections:
    """An expert with the projections to and from the latent that it works in, if there is one."""
    if experts.latent is None:
        return part
    inner, outer = (Linear(below(block, path)) for path in experts.latent)
    up = None if part.up is None else Chained(part.up.module, part.up.part, inner=inner)
    gate, down = Chained(part.gate.module, part.gate.part, inner=inner), Chained(part.down.module, outer=outer)
    return replace(part, gate=gate, up=up, down=down)


def _always(held: nn.Module, experts: Experts, first: int) -> Iterator[_Projections]:
    """Experts that all positions are sent to, numbered from ``first`` on."""
    assert experts.up is not None
    stacks = [below(held, name) for name in (experts.gate, experts.up, experts.down)]
    for index in range(len(stacks[0])):
        gate, up, down = (Linear(Stacked(stack, index)) for stack in stacks)
        yield _Projections(f"E{first + index}", gate, up, down, _activation(held, experts))


def _stack(held: nn.Module, path: Path) -> tuple[Tensor, Tensor | None]:
    """The tensor of all experts' weights, and that of their biases if there is one."""
    return below(held, path), getattr(held, f"{name_of(path)}_bias", None)


def _activation(held: nn.Module, experts: Experts) -> Activation:
    return Activation(below(held, experts.act_fn)) if experts.activation is None else experts.activation(held)


def _even(weight: Tensor) -> Tensor:
    return weight[0::2]


def _odd(weight: Tensor) -> Tensor:
    return weight[1::2]
