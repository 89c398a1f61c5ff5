"""The linear rules: a component's share of a neuron is a fixed linear function of what it adds to the neuron's inputs.

With the frozen pre-activations G of the gate and U of the up projection, and the frozen activation A = act(G) · U, a
component that contributes g to G and u to U receives ``gate`` · g + ``up`` · u of A. Components do not meet: zero stays
zero, nobody is left out, and the whole network is linear, given the trace (DESIGN.md section 8).

====================  ==========================================  ==============================
rule                  share of A                                  origin
====================  ==========================================  ==============================
`taylor`              g · A/G                                     the published code
`half`                ½ · (g · A/G + u · act(G))                  LRP's uniform rule (RelP)
`shapley`             g · U · (act(G) - B)/G + u · B              Aumann and Shapley's value
====================  ==========================================  ==============================

B = ∫₀¹ act(tG) dt. Gates receive what ups leave of A, so that shares sum to A as it was recorded, whatever B is: its
precision moves credit between gate and up, and never loses any. Constants, the projections' biases among them, are
shares of `bias`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from .adapters import Activation, Mlp
    from .trace.record import MlpTrace

LINEAR_RULES = ("taylor", "half", "shapley")

Curve = Callable[[Tensor], Tensor]

_STEP = 2.0**-10  # of the difference that gives a curve's slope at zero
_BREAKS = (0.0, 3.0, 8.0, 20.0, torch.inf)  # of |G|: eight nodes in each part give B to 6e-9
_NODES = 8  # in float64 twice as many
_EVERY = len(_BREAKS) - 1
_ON_A_CPU, _ELSEWHERE = (1 << 18, 1 << 18), (1 << 22, 1 << 24)  # coefficients, and values of a curve, made at once


@dataclass(frozen=True)
class LinearShares:
    """Coefficients of a rule at P positions for I neurons: gates g and ups u receive ``gate`` · g + ``up`` · u.

    gate (P, I), up (P, I): None where the rule, or an ungated MLP, does not look at the up projection.
    constant (P, I): what is nobody's g or u, for `bias`; None where there is no such thing.
    """

    gate: Tensor
    up: Tensor | None = None
    constant: Tensor | None = None

    def of_bias(self, gate_constant: Tensor | None, up_constant: Tensor | None) -> Tensor | None:
        """Return the share (P, I) of constants (I,) in the gates and ups, and of what is nobody's; None for nothing."""
        parts = [] if self.constant is None else [self.constant]
        if gate_constant is not None:
            parts.append(self.gate * gate_constant.to(self.gate))
        if up_constant is not None and self.up is not None:
            parts.append(self.up * up_constant.to(self.up))
        return sum(parts[1:], parts[0]) if parts else None

    def written_constant(
        self,
        weights: Mlp,
        trace: MlpTrace,
        recorded: Tensor,
        out_scale: Tensor | None,
        dtype: torch.dtype,
        w_down: Tensor | None = None,
    ) -> Tensor | None:
        """Return what the MLP writes of its constants at the ``recorded`` rows (P,): (P, D), or (D,), or None.

        ``out_scale`` (P,) is s of a norm on the output, if there is one. ``w_down`` (D, I) is the weight as it writes
        (``Mlp.writing``), in the dtype of the product; by default in ``dtype``.
        """
        at = recorded if trace.positions is None else trace.positions[recorded]
        fixed = weights.written_constant(trace.constant(weights, at, dtype), out_scale, dtype)
        up_constant = None if self.up is None else weights.up_constant(dtype)
        driven = self.of_bias(weights.gate_constant(dtype), up_constant)
        if driven is None:
            return fixed
        if out_scale is not None:
            driven = driven * out_scale[:, None].to(driven)
        w_down = weights.writing(weights.w_down, dtype) if w_down is None else w_down
        written = (driven.to(w_down.dtype) @ w_down.T).to(dtype)
        return written if fixed is None else written + fixed

    def at(self, rows: slice | Tensor) -> LinearShares:
        """Return the coefficients at some of the positions: views for a slice."""
        return LinearShares(self.gate[rows], *(None if x is None else x[rows] for x in (self.up, self.constant)))

    def put(self, rows: slice, part: LinearShares) -> None:
        """Write the coefficients of some of the positions."""
        for mine, other in zip((self.gate, self.up, self.constant), (part.gate, part.up, part.constant), strict=True):
            if mine is not None and other is not None:
                mine[rows] = other


def linear_shares(
    rule: str,
    weights: Mlp,
    trace: MlpTrace,
    recorded: Tensor | slice,
    dtype: torch.dtype,
    up: Tensor | None = None,
) -> LinearShares:
    """Return the coefficients of a linear ``rule`` at the ``recorded`` rows of an MLP's trace, in ``dtype``.

    They are computed in float32 at least. ``up`` (P, I) is U there, if it is known. The router's weight is part of the
    coefficients; the scale of a norm on the output is not.

    Raises:
        ValueError: the trace of an expert lacks the router's weight, as traces saved by earlier versions do.
    """
    n_recorded, n_neurons = trace.gate.shape
    n = len(range(*recorded.indices(n_recorded))) if isinstance(recorded, slice) else len(recorded)
    most = max(1, at_once(trace.gate.device.type == "cpu")[0] // n_neurons)
    if n <= most:
        return _shares(rule, weights, trace, recorded, dtype, up)
    at, found, done = recorded, None, 0
    if isinstance(at, slice):
        at = torch.arange(n_recorded, device=trace.gate.device)[at]
    for part in at.split(most):  # what is held beside the coefficients does not grow with the prompt
        rows = slice(done, done + len(part))
        made = _shares(rule, weights, trace, part, dtype, None if up is None else up[rows])
        if found is None:
            tables = (None if x is None else x.new_empty(n, n_neurons) for x in (made.up, made.constant))
            found = LinearShares(made.gate.new_empty(n, n_neurons), *tables)
        found.put(rows, made)
        done = rows.stop
    assert found is not None
    return found


def _shares(
    rule: str,
    weights: Mlp,
    trace: MlpTrace,
    recorded: Tensor | slice,
    dtype: torch.dtype,
    up: Tensor | None,
) -> LinearShares:
    """Return the coefficients at so few rows that they can be made at once."""
    wide = torch.promote_types(dtype, torch.float32)
    gate, act = (x[recorded].to(wide) for x in (trace.gate, trace.act))
    if rule == "taylor":
        return LinearShares(_ratio(act, gate, 0.0).to(dtype))
    activation, weight = weights.activation, _factors_behind(weights, trace, recorded, wide)
    assert activation is not None, "it was checked when the rule was"
    if activation.sparsity:
        assert weights.up is not None  # no ungated MLP is known to have a threshold
        raw = frozen_up(weights, trace, recorded, wide) if up is None else up.to(wide)
        found = _cut_off(rule, activation, gate, act, raw, weight)
        return LinearShares(*(None if x is None else x.to(dtype) for x in found))  # pyright: ignore[reportArgumentType]
    limited = activation.limited_gate(gate)
    gate_ratio = 1.0 if activation.gate_limit is None else _ratio(limited, gate, 1.0)
    at_zero, slope = _at_zero(activation.curve)
    # near zero, what a curve has beyond its value there is all rounding
    near = 0.0 if _is_zero(at_zero) else torch.finfo(trace.act.dtype).eps ** 0.5 * abs(at_zero)
    if weights.up is None:
        of_gate = _ratio(act - weight * at_zero, limited, weight * slope, near)
        found = LinearShares(of_gate * gate_ratio, None, None if _is_zero(at_zero) else act - of_gate * limited)
    else:
        raw = (frozen_up(weights, trace, recorded, wide) if up is None else up).to(wide)
        up = activation.limited_up(raw)
        up_ratio = 1.0 if activation.up_limit is None else _ratio(up, raw, 1.0)
        up = up + activation.up_offset if activation.up_offset else up
        of_up = mean_to_zero(activation.curve, limited) if rule == "shapley" else 0.5 * activation.curve(limited)
        of_up = of_up if isinstance(weight, float) else of_up * weight
        driven = act - of_up * up  # by the gate: the shares sum to the activation as it was recorded
        constant = activation.up_offset * of_up if activation.up_offset else None
        if rule == "half" and not _is_zero(at_zero):
            more = 0.5 * weight * at_zero * up
            driven, constant = driven - more, more if constant is None else constant + more
        of_gate = _ratio(driven, limited, 0.5 * weight * slope * up, near)
        if rule == "half" and constant is not None:
            constant = constant + (driven - of_gate * limited)  # what is left where the slope stands for the ratio
        found = LinearShares(of_gate * gate_ratio, of_up * up_ratio, constant)
    parts = (None if x is None else x.to(dtype) for x in (found.gate, found.up, found.constant))
    return LinearShares(*parts)  # pyright: ignore[reportArgumentType] (the gate's is there)


def _cut_off(
    rule: str, activation: Activation, gate: Tensor, act: Tensor, up: Tensor, weight: Tensor | float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the coefficients (P, I) of gate and up, and the constant, where gates are cut off at a frozen threshold c.

    B = ∫₀¹ act(max(tG - c, 0)) dt is (F(max(G - c, 0)) - F(max(-c, 0))) / G with F the integral of the activation.
    """
    limited, below = activation.limited_gate(gate), torch.relu(-activation.threshold(gate))
    at_zero = activation.curve(below)  # (P, 1): zero where c > 0
    if rule == "shapley":
        whole, less = (x * mean_to_zero(activation.curve, x) for x in (limited, below))
        of_up, constant, near = _ratio(whole - less, gate, at_zero) * weight, None, 0.0
        driven = act - of_up * up
    else:
        of_up, constant = 0.5 * activation.curve(limited) * weight, 0.5 * weight * at_zero * up
        driven, near = act - of_up * up - constant, torch.finfo(act.dtype).eps ** 0.5 * at_zero.abs()
    of_gate = _ratio(driven, gate, 0.0, near)
    return of_gate, of_up, None if constant is None else constant + (driven - of_gate * gate)


def frozen_up(weights: Mlp, trace: MlpTrace, recorded: Tensor | slice, dtype: torch.dtype) -> Tensor:
    """Return U, the up projection's pre-activations at the ``recorded`` rows of an MLP's trace: (P, I), in ``dtype``.

    It is recomputed from the residual stream, as the trace does not hold it.
    """
    at = recorded if trace.positions is None else trace.positions[recorded]
    x, constant = trace.resid[at].to(torch.promote_types(dtype, torch.float32)), weights.up_constant(dtype)
    x = (x if weights.norm is None else weights.norm.normed(x)).to(dtype)
    x = x if trace.input_weight is None else x * trace.input_weight[recorded, None].to(x)
    up = x @ weights.w_up.to(dtype).T
    return up if constant is None else up + constant


def looks_at_up(rule: str | None) -> bool:
    """True if a linear rule looks at the up projection where there is one; None is no linear rule."""
    return rule not in (None, "taylor")


def reads_up(rule: str, weights: Mlp) -> bool:
    """True if a rule looks at the up projection of an MLP."""
    return looks_at_up(rule) and weights.up is not None


def adds_constant(rule: str, weights: Mlp) -> bool:
    """True if an MLP has a constant that is a share of `bias` under this rule, beside those of its projections."""
    activation = weights.activation
    if rule == "taylor" or activation is None:
        return False
    if activation.sparsity:  # a threshold below zero lets pass what no gate has
        return rule == "half"
    if weights.up is None or rule == "half":
        return not _is_zero(_at_zero(activation.curve)[0]) or (weights.up is not None and activation.up_offset != 0)
    return activation.up_offset != 0


def mean_to_zero(curve: Curve, x: Tensor) -> Tensor:
    """Return B = ∫₀¹ curve(t · x) dt (P, I), element by element, to about 1e-8: a Gauss rule on each part of |x|."""
    on_cpu = x.device.type == "cpu"  # most elements are small: a CPU looks for the others, a GPU would be waited for
    size = at_once(on_cpu)[1] // (2 * _NODES * (1 if on_cpu else _EVERY) * x.shape[1])
    parts = x.split(max(1, size))
    return torch.cat([_mean_of_few(curve, part) if on_cpu else _mean_of_parts(curve, part, 0) for part in parts])


def _mean_of_few(curve: Curve, x: Tensor) -> Tensor:
    """The mean, with the parts behind the first one only for the elements that reach them."""
    _, nodes, weights = _gauss(x.dtype, x.device)
    within = x.clamp(-_BREAKS[1], _BREAKS[1])
    found = torch.tensordot(weights, curve(nodes.view(-1, *[1] * x.ndim) * within), 1)
    large = within != x
    if large.any():
        some = x[large]
        found[large] = found[large] * (within[large] / some) + _mean_of_parts(curve, some, 1)
    return found


def _mean_of_parts(curve: Curve, x: Tensor, first: int) -> Tensor:
    """Return what the parts of [0, |x|] from number ``first`` on add to the mean."""
    breaks, nodes, weights = _gauss(x.dtype, x.device)
    one = [1] * x.ndim
    low, high = (ends.view(-1, *one) for ends in (breaks[first:-1], breaks[first + 1 :]))  # (K, 1, ...)
    size = x.abs().clamp_min(torch.finfo(x.dtype).tiny)  # all of a point is in the first part
    above = torch.maximum(size, low)
    share = (torch.minimum(above, high) - low) / size  # (K, ...) of [0, |x|]
    begin = low / above
    t = torch.addcmul(begin, nodes.view(-1, 1, *one), share)  # (8, K, ...)
    return (torch.tensordot(weights, curve(t.mul_(x)), 1) * share).sum(0)


@lru_cache(maxsize=8)
def _gauss(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return where the parts of |x| end (5,), and nodes and weights of Gauss and Legendre's rule on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(_NODES * (2 if dtype == torch.float64 else 1))
    each = (_BREAKS, (nodes + 1) / 2, weights / 2)
    return tuple(torch.tensor(x, dtype=dtype, device=device) for x in each)  # pyright: ignore[reportReturnType]


def at_once(on_cpu: bool) -> tuple[int, int]:
    """The numbers of coefficients, and of a curve's values, that are made at once."""
    return _ON_A_CPU if on_cpu else _ELSEWHERE


def _at_zero(curve: Curve) -> tuple[Tensor | float, Tensor | float]:
    """Return a curve's value and its slope at zero: numbers, or float64 scalars on the device of its parameters."""
    own = next(iter(curve.parameters()), None) if isinstance(curve, torch.nn.Module) else None
    device = torch.device("cpu") if own is None else own.device
    points = torch.tensor([-_STEP, 0.0, _STEP], dtype=torch.float64, device=device)
    below, at, above = curve(points).to(torch.float64)
    slope = (above - below) / (2 * _STEP)
    return (float(at), float(slope)) if own is None else (at, slope)


def _is_zero(value: Tensor | float) -> bool:
    """True if a curve vanishes at zero for certain, without waiting for a device."""
    return not isinstance(value, Tensor) and value == 0.0


def _ratio(a: Tensor, b: Tensor, limit: Tensor | float, near: Tensor | float = 0.0) -> Tensor:
    """Return a / b, and ``limit`` where b is zero, or as ``near`` to it."""
    is_near = b == 0 if isinstance(near, float) and near == 0.0 else b.abs() <= near
    return torch.where(is_near, limit, a / b)


def _factors_behind(weights: Mlp, trace: MlpTrace, recorded: Tensor | slice, dtype: torch.dtype) -> Tensor | float:
    """Return the factors (P, 1) or (P, I) behind an activation, 1.0 where there are none."""
    factors = trace.behind(weights, recorded, dtype)
    if factors is not None:
        return factors
    if weights.name:
        raise ValueError(
            "trace: it was saved by an earlier version, without the router's weights; trace the prompt again."
        )
    return 1.0
