"""The allocation rules: how a frozen neuron's output is shared out among the components that drive it.

They are written once, plainly and completely (DESIGN.md section 2). The reference backend uses nothing else; a fast
backend computes the common case by itself and calls these functions in the corners. A rule maps gates to weights
(n, M, I) that sum to one over the components. A user's own rule is any callable of that form.

In a linear rule components do not meet, and it is no such function: see :mod:`.linear_rules`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .linear_rules import LINEAR_RULES


@dataclass(frozen=True)
class Gates:
    """The input of a rule: n positions with M components, in row order, and I neurons.

    values (n, M, I): g, each component's share of the gate's pre-activation.
    total (n, I): the frozen pre-activation itself.
    alive (n, M): True if the component's state is not exactly zero at that position.
    excluded (n, M): True for a special token at any position but its own.
    positions (n,): positions in the prompt.
    rest, bias: the indices of these components, or None.
    constant (I,): the part of every gate that `bias` drives without a state, None if there is none; it is in values.
    """

    values: Tensor
    total: Tensor
    alive: Tensor
    excluded: Tensor
    positions: Tensor
    rest: int | None
    bias: int | None = None
    constant: Tensor | None = None

    @property
    def eligible(self) -> Tensor:
        """The components that take part, (n, M, 1) or (n, M, I), see :func:`taking_part`."""
        return taking_part(self.alive, self.excluded, self.bias, self.constant)


def taking_part(alive: Tensor, excluded: Tensor, bias: int | None, constant: Tensor | None) -> Tensor:
    """Return who takes part, (n, M, 1), or (n, M, I) where `bias` drives neurons by a ``constant`` (I,).

    Whoever is alive and not excluded takes part, however small its gate; a gate that is zero says nothing. `bias` also
    takes part in neurons whose constant is not zero. Arguments as of :class:`Gates`.
    """
    part = (alive & ~excluded)[..., None]
    if bias is None or constant is None:
        return part
    part = part.repeat(1, 1, len(constant))
    part[:, bias] |= constant != 0
    return part


Rule = Callable[[Gates, float], Tensor]

# A rule may have an attribute `edit_gates` of this form. It promises that the rule is the softmax of edited gates, and
# fast backends then call the rule itself only where a neuron finds nobody eligible. The arguments are the gates
# (n, M, I) of all components, which it edits in place, the positions (n,) in the prompt, and the factor that the gates
# have been multiplied by. Gates of components that are not alive are -inf already. It sets others to -inf to shut
# components out, and returns True if it did so anywhere.
Edit = Callable[[Tensor, Tensor, float], bool]


def softmax(gates: Gates, temperature: float) -> Tensor:
    """Weights w = softmax over the components of g / T."""
    eligible = gates.eligible
    z = gates.values.masked_fill(~eligible, -torch.inf)
    top = z.amax(1, keepdim=True)
    z = (z - top.masked_fill(top == -torch.inf, 0.0)) * inverse(temperature, z.dtype)
    return _normalised(torch.exp(z), eligible, gates)


def linear(gates: Gates, temperature: float) -> Tensor:
    """Weights w ∝ g - min g; an even split where all g are equal."""
    eligible = gates.eligible
    low = gates.values.masked_fill(~eligible, torch.inf).amin(1, keepdim=True)
    shifted = torch.where(eligible, gates.values - low.masked_fill(low == torch.inf, 0.0), 0.0)
    level = shifted.sum(1, keepdim=True) == 0
    return _normalised(torch.where(level & eligible, 1.0, shifted), eligible, gates)


def relu(gates: Gates, temperature: float) -> Tensor:
    """Weights w ∝ max(g, 0): only components that open the gate take part."""
    eligible = gates.eligible & ~(gates.values <= 0)  # NaN is kept
    return _normalised(gates.values.clamp_min(0.0), eligible, gates)


def winner(gates: Gates, temperature: float) -> Tensor:
    """Weight 1 for the component with the largest g, the first of equals; 0 for all others."""
    eligible = gates.eligible
    top, best = gates.values.masked_fill(~eligible, -torch.inf).max(1, keepdim=True)
    one = torch.where(top.isnan(), top, 1.0)
    return _normalised(torch.zeros_like(gates.values).scatter_(1, best, one), eligible, gates)


def inverse(temperature: float, dtype: torch.dtype) -> float:
    """Return 1 / T within the range of ``dtype``: an infinite one times zero, or zero times infinity, would be NaN."""
    return max(torch.finfo(dtype).tiny, min(1.0 / temperature, torch.finfo(dtype).max))


RULES: dict[str, Rule] = {"softmax": softmax, "linear": linear, "relu": relu, "max": winner}
NAMES = (*RULES, *LINEAR_RULES)


def _normalised(weights: Tensor, eligible: Tensor, gates: Gates) -> Tensor:
    """Normalise over the components. A neuron without eligible ones gives all to `rest`, else evenly to those alive."""
    weights = torch.where(eligible, weights, 0.0)
    nobody = ~eligible.any(1, keepdim=True)
    weights = weights / torch.where(nobody, 1.0, weights.sum(1, keepdim=True))
    if gates.rest is not None:
        fallback = torch.zeros_like(weights[:, :, :1])
        fallback[:, gates.rest] = 1.0
    else:
        alive = gates.alive[..., None].to(weights.dtype)
        fallback = alive / alive.sum(1, keepdim=True).clamp_min(1.0)
    return torch.where(nobody, fallback, weights)


@dataclass(frozen=True)
class Allocation:
    """A rule and its temperature T > 0 (only `softmax` reads it)."""

    rule: str | Rule = "softmax"
    temperature: float = 0.1

    def __post_init__(self) -> None:
        if not callable(self.rule) and self.rule not in NAMES:
            raise ValueError(
                f"allocation: unknown rule {self.rule!r}. Allowed: {', '.join(NAMES)}, or a callable "
                "(gates, T) -> weights."
            )
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature: {self.temperature!r} is out of range; it must be positive and finite.")

    @property
    def edit(self) -> Edit | None:
        """The rule's edit of the gates if it is the softmax of edited gates, else None; see :data:`Edit`."""
        return getattr(self.rule, "edit_gates", None)

    @property
    def is_softmax(self) -> bool:
        """True if the weights are the softmax of the gates, edited or not."""
        return self.rule == "softmax" or self.edit is not None

    @property
    def linear_rule(self) -> str | None:
        """The rule's name if it is one of :data:`LINEAR_RULES`, else None."""
        return self.rule if isinstance(self.rule, str) and self.rule in LINEAR_RULES else None

    @property
    def needs_activations(self) -> bool:
        """True for a rule that reads up projections and activation functions, beside what a trace holds."""
        return self.linear_rule not in (None, "taylor")

    @property
    def name(self) -> str:
        """The rule's name, or that of its function or class."""
        return getattr(self.rule, "__name__", type(self.rule).__name__) if callable(self.rule) else self.rule

    def weights(self, gates: Gates) -> Tensor:
        """Return the weights (n, M, I) of this rule, which is not linear.

        Raises:
            ValueError: a user's rule returned anything else.
        """
        if not callable(self.rule):
            return RULES[self.rule](gates, self.temperature)
        weights = self.rule(gates, self.temperature)
        if not isinstance(weights, Tensor) or weights.shape != gates.values.shape:
            given = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise ValueError(f"allocation: {self.name} must return weights {tuple(gates.values.shape)}, got {given}.")
        return weights.to(gates.values)
