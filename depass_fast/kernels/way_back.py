"""The way back through the neurons of a linear rule, in one launch: gradients of gates and ups, and neurons' scores.

``y`` are the gradients of what neurons write. With the frozen gates G, ups U and activations A the kernel makes the
rule's coefficients (:mod:`depass_fast.linear_rules`), B = ∫₀¹ act(tG) dt among them, and keeps none of it in memory.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (Triton declares a kernel's constants as `constexpr` and gets numbers; num_warps is no parameter of a kernel)

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import FLOATS, check, power_of_two

CURVES = ("silu", "gelu", "gelu_tanh", "relu")  # activations that the kernel knows; all have the slope 1/2 at zero
RULES = ("half", "shapley")


@triton.jit
def _curve(x, CURVE: tl.constexpr):
    """An activation of the gate, float32."""
    if CURVE == "silu":
        y = x * tl.sigmoid(x)
    elif CURVE == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif CURVE == "gelu_tanh":
        y = x * tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))  # (1 + tanh z) / 2 = sigmoid(2 z)
    else:
        y = tl.maximum(x, 0.0)
    return y


@triton.jit
def _part_of_mean(x, size, low, high, nodes, weights, CURVE: tl.constexpr, NODES: tl.constexpr):
    """The part of the mean of a curve between zero and x that lies where |x| is between ``low`` and ``high``."""
    share = (tl.minimum(tl.maximum(size, low), high) - low) / size
    begin = low / tl.maximum(size, low)
    total = tl.zeros(x.shape, tl.float32)
    for j in range(NODES):
        t = begin + tl.load(nodes + j) * share
        total += tl.load(weights + j) * _curve(t * x, CURVE)
    return total * share


@triton.jit
def _mean_to_zero(x, nodes, weights, CURVE: tl.constexpr, NODES: tl.constexpr):
    """B = ∫₀¹ curve(t · x) dt, by a Gauss rule on each of four parts of |x|."""
    size = tl.maximum(tl.abs(x), 1.1754943508222875e-38)
    total = _part_of_mean(x, size, 0.0, 3.0, nodes, weights, CURVE, NODES)
    total += _part_of_mean(x, size, 3.0, 8.0, nodes, weights, CURVE, NODES)
    total += _part_of_mean(x, size, 8.0, 20.0, nodes, weights, CURVE, NODES)
    return total + _part_of_mean(x, size, 20.0, float("inf"), nodes, weights, CURVE, NODES)


@triton.jit(do_not_specialize=["n_positions", "n_pieces"])
def _neurons_back(
    y, of_up, act, gate, up, router, recorded, pieces, scores, nodes, weights, n_positions, n_pieces, n_neurons,
    act_stride, gate_stride, RULE: tl.constexpr, CURVE: tl.constexpr, GATED: tl.constexpr, ROUTED: tl.constexpr,
    BN: tl.constexpr, BI: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BI + tl.arange(0, BI)
    piece, row = tl.program_id(1), tl.program_id(2).to(tl.int64)
    first, last = tl.load(pieces + piece), tl.load(pieces + piece + 1)
    inside = i < n_neurons
    total = tl.zeros((BI,), tl.float32)
    for begin in range(first, last, BN):
        n = begin + tl.arange(0, BN)
        here = (n < last)[:, None] & inside[None, :]
        at = tl.load(recorded + n, mask=n < last, other=0)
        a = tl.load(act + at[:, None] * act_stride + i[None, :], mask=here, other=0.0).to(tl.float32)
        g = tl.load(gate + at[:, None] * gate_stride + i[None, :], mask=here, other=0.0).to(tl.float32)
        where = (row * n_positions + n.to(tl.int64))[:, None] * n_neurons + i[None, :]
        back = tl.load(y + where, mask=here, other=0.0).to(tl.float32)
        total += tl.sum(back * a, 0)
        routed = tl.full((BN, 1), 1.0, tl.float32)
        if ROUTED:
            routed = tl.load(router + at, mask=n < last, other=0.0).to(tl.float32)[:, None]
        if GATED:
            u = tl.load(up + n.to(tl.int64)[:, None] * n_neurons + i[None, :], mask=here, other=0.0).to(tl.float32)
            if RULE == "half":
                c_up = 0.5 * routed * _curve(g, CURVE)
            else:
                c_up = routed * _mean_to_zero(g, nodes, weights, CURVE, NODES)
            driven = a - c_up * u
            limit = 0.25 * routed * u
            tl.store(of_up + where, (back * c_up).to(of_up.dtype.element_ty), mask=here)
        else:
            driven, limit = a, 0.5 * routed + 0.0 * a
        c_gate = tl.where(g == 0.0, limit, driven / tl.where(g == 0.0, 1.0, g))
        tl.store(y + where, (back * c_gate).to(y.dtype.element_ty), mask=here)
    tl.store(scores + (row * n_pieces + piece) * n_neurons + i, total, mask=inside)


def neurons_back(
    y: Tensor,
    act: Tensor,
    gate: Tensor,
    up: Tensor | None,
    recorded: Tensor,
    pieces: Tensor,
    rule: str,
    curve: str,
    router: Tensor | None = None,
) -> tuple[Tensor | None, Tensor]:
    """Turn gradients of what neurons write, ``y`` (R, A, I), into those of their gates, in place.

    ``act`` and ``gate`` (P, I) are the trace's, of which position a reads the row ``recorded`` (A,) int64. ``up``
    (A, I) are the up projections, None in an ungated MLP, ``router`` (P,) an expert's weights. ``pieces`` (S + 1,)
    int32 cut the positions.

    Returns:
        the gradients of the ups (R, A, I) in y's dtype, or None; the neurons' scores in every piece, (R, S, I) float32.

    Raises:
        ValueError: an unknown rule or curve; a tensor of another shape, dtype or memory layout.
    """
    if rule not in RULES or curve not in CURVES:
        raise ValueError(f"rule, curve: {rule!r} and {curve!r} are not of {', '.join(RULES)} and {', '.join(CURVES)}.")
    check("y", y, (None, None, None), *FLOATS)
    n_rows, n_positions, n_neurons = y.shape
    for name, x in (("act", act), ("gate", gate)):
        check(name, x, (None, n_neurons), *FLOATS, spaced=True)
    check("recorded", recorded, (n_positions,), torch.int64)
    check("pieces", pieces, (None,), torch.int32)
    if up is not None:
        check("up", up, (n_positions, n_neurons), *FLOATS)
    if router is not None:
        check("router", router, (len(act),), *FLOATS)
    of_up = None if up is None else torch.empty_like(y)
    n_pieces = len(pieces) - 1
    scores = y.new_empty(n_rows, n_pieces, n_neurons, dtype=torch.float32)
    nodes, weights = _gauss(y.device)
    config = {"BN": 16, "BI": min(32, power_of_two(n_neurons)), "num_warps": 4}
    _neurons_back[(triton.cdiv(n_neurons, config["BI"]), n_pieces, n_rows)](
        y, y if of_up is None else of_up, act, gate, y if up is None else up, act if router is None else router,
        recorded, pieces, scores, nodes, weights, n_positions, n_pieces, n_neurons, act.stride(0), gate.stride(0),
        RULE=rule, CURVE=curve, GATED=up is not None, ROUTED=router is not None, NODES=len(nodes), **config,
    )  # fmt: skip
    return of_up, scores


@lru_cache(maxsize=8)
def _gauss(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return nodes and weights (8,) of Gauss and Legendre's rule on [0, 1], float32."""
    nodes, weights = np.polynomial.legendre.leggauss(8)
    return tuple(torch.tensor(x / 2, dtype=torch.float32, device=device) for x in (nodes + 1, weights))  # pyright: ignore[reportReturnType]
