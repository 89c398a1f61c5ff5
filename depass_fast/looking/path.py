"""From even attention to the model's: the average of attention's derivative along the way (DESIGN.md section 9)."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

_NODES = (12, 24, 48, 96, 192, 384)
_TINY = 1e-30
_ROUNDINGS = 8  # of a sum of what keys are worth, in eps
_CLOSE = {torch.float32: 2e-6, torch.float64: 1e-11}  # of what the closing leaves, relative to the parts


def path_average(logits: Tensor, worth: Tensor) -> tuple[Tensor, Tensor]:
    """Average the derivative of Σ_k P_k v_k by the logits, over P = softmax(τ S) from τ = 0 to 1.

    Its product with the logits is the change of that sum from even attention to the model's. Gauss nodes are doubled
    until it is, nearly, and what is left is closed along the logits.

    Args:
        logits: S (..., K), -inf for keys that are not seen.
        worth: v (R, ..., K), finite everywhere.

    Returns:
        the average (R, ..., K), which sums to zero over the keys; the change (R, ...).
    """
    seen = torch.isfinite(logits)
    even = seen.to(logits.dtype) / seen.sum(-1, keepdim=True)
    finite = logits.masked_fill(~seen, 0.0)
    # what keys have in common changes nothing, and would only round
    centred = torch.where(seen, finite - (finite * even).sum(-1, keepdim=True), 0.0)
    rounding = _ROUNDINGS * torch.finfo(logits.dtype).eps * (even * worth.abs()).sum(-1)
    worth = worth - (even * worth).sum(-1, keepdim=True)
    change = ((centred.masked_fill(~seen, -torch.inf).softmax(-1) - even) * worth).sum(-1)
    for count in _NODES:
        average = _average(centred.masked_fill(~seen, -torch.inf), worth, count)
        parts = average * centred
        missed = change - parts.sum(-1)
        allowed = _CLOSE[logits.dtype] * (parts.abs().sum(-1) + change.abs()) + rounding
        if bool((missed.abs() <= allowed).all()):
            break
    length = centred.square().sum(-1)
    # what is only rounding stays: where logits nearly agree, closing would blow it up
    closing = torch.where((missed.abs() > rounding) & (length > 0), missed / length.clamp_min(_TINY), 0.0)
    return average + closing[..., None] * centred, change


def _average(logits: Tensor, worth: Tensor, count: int) -> Tensor:
    out = torch.zeros_like(worth)
    for tau, weight in _nodes(count):
        p = (logits * tau).softmax(-1)
        parts = p * worth
        out.add_(parts, alpha=weight).addcmul_(p, parts.sum(-1, keepdim=True), value=-weight)
    return out


@functools.cache
def _nodes(count: int) -> list[tuple[float, float]]:
    """Gauss-Legendre nodes of [0, 1] in √τ, as most happens near τ = 0 where logits differ much: (τ, weight)."""
    x, weights = np.polynomial.legendre.leggauss(count)
    u = (x + 1) / 2
    return list(zip((u**2).tolist(), (weights * u).tolist(), strict=True))  # dτ = 2u du, and the weights' own half
