"""The credit of a layer's looking: its gradients by queries and keys, and by what they read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..adapters import Attention
from ..runtime.products import product
from ..trace.record import AttentionTrace
from .logits import logits_of
from .path import path_average
from .sides import Sides

_CPU_TILE, _GPU_TILE = 1 << 20, 1 << 25  # logits, times the rows of gradients, that are held at once


@dataclass(frozen=True)
class Steering:
    """The credit of one layer's looking in one prompt, in R rows, for each of its H heads (DESIGN.md section 9).

    ``of_q`` and ``of_k`` (R, N, H, d) are the gradients of queries and, by the head that reads them, of keys.
    ``constant`` and ``position`` (R, H) are the credit of constants in queries, keys and sinks, and that of what is
    added to keys for their places; ``change`` (R, H) is the sum of all credit: what a head gives, minus what it would
    give if it looked evenly at all that it sees.
    """

    sides: Sides
    of_q: Tensor
    of_k: Tensor
    constant: Tensor
    position: Tensor
    change: Tensor

    def together(self) -> Tensor:
        """Return λ (R, N, D), all heads together: a component's credit is Σ_n ⟨λ[n], X[n]⟩."""
        sides, groups = self.sides, self.sides.groups
        of_k = self.of_k if groups == 1 else self.of_k.unflatten(-2, (-1, groups)).sum(-2)
        return sides.of_q.back(self.of_q) + sides.of_k.back(of_k)

    def apart(self, heads: slice) -> Tensor:
        """Return λ (R, h, N, D) of each of some ``heads``."""
        sides = self.sides
        which = torch.arange(self.of_q.shape[2], device=self.of_q.device)[heads] // sides.groups
        return sides.of_q.back(self.of_q, heads) + sides.of_k.back_by_head(self.of_k[:, :, heads], which)


@dataclass(frozen=True)
class Outlook:
    """One layer's attention in the prompt at ``span``, and what its heads' outputs are worth to a target.

    ``of_heads`` (R, Q, H, d) are gradients of the heads' outputs at local ``queries`` (Q,), ``values`` (N, Hkv, d) the
    model's, with constants.
    """

    trace: AttentionTrace
    sides: Sides
    span: slice
    queries: Tensor
    of_heads: Tensor
    values: Tensor


def steer(given: Outlook) -> Steering:
    """Return the credit of looking."""
    trace, sides, span = given.trace, given.sides, given.span
    queries, of_heads, values = given.queries, given.of_heads, given.values
    rows, (n, heads, width), groups = len(of_heads), sides.q.shape, sides.groups
    of_q, of_k = (of_heads.new_zeros(rows, n, heads, width) for _ in range(2))
    constant, position, change = (of_heads.new_zeros(rows, heads) for _ in range(3))
    for some, at in _tiles(heads, queries, n, rows, of_heads.device.type == "cpu"):
        here = queries[at]
        found = logits_of(sides, trace, span, some, here, int(here.max()) + 1)
        keys, which = found.ratio.shape[-1], torch.arange(heads, device=values.device)[some] // groups
        worth = torch.einsum("rqhd,khd->rhqk", of_heads[:, at, some], values[:keys][:, which])
        worth = nn.functional.pad(worth, (0, 1)) if found.has_sink else worth
        average, moved = path_average(found.values, worth)
        if (logit := found.sink) is not None:
            constant[:, some] += (average[..., -1] * logit).sum(-1)
            average = average[..., :-1]
        if found.bias is not None:
            position[:, some] += (average * found.bias).sum((-2, -1))
        change[:, some] += moved.sum(-1)
        half = average * (found.ratio / 2)  # of a product's logit, half is the query's and half the key's
        of_q[:, here, some] = torch.einsum("rhqk,khd->rqhd", half, sides.k[:keys][:, which])
        of_k[:, :keys, some] += torch.einsum("rhqk,qhd->rkhd", half, sides.q[here, some])
    if sides.of_q.constant is not None:
        constant += torch.einsum("rnhd,nhd->rh", of_q, sides.of_q.constant.to(of_q))
    if sides.of_k.constant is not None:
        constant += torch.einsum("rnhd,nhd->rh", of_k, sides.of_k.constant.to(of_k).repeat_interleave(groups, 1))
    return Steering(sides, of_q, of_k, constant, position, change)


def _tiles(heads: int, queries: Tensor, n: int, rows: int, is_cpu: bool) -> Iterator[tuple[slice, Tensor]]:
    """Cut heads and queries so that a tile holds few logits: (heads, indices of queries)."""
    most = max(1, (_CPU_TILE if is_cpu else _GPU_TILE) // (rows * n))
    at_once = min(len(queries), most)
    together = max(1, most // at_once)
    for begin in range(0, heads, together):
        for at in torch.arange(len(queries), device=queries.device).split(at_once):
            yield slice(begin, min(heads, begin + together)), at


def values_of(weights: Attention, trace: AttentionTrace, x: Tensor, span: slice) -> Tensor:
    """Return the model's values (N, Hkv, d) at the prompt's residual stream ``x`` (N, D)."""
    normed = x if weights.norm is None else weights.norm.apply(x, weights.scale(x))
    values = product(normed, weights.w_v.to(x.dtype).T)
    if trace.latent_scale is not None:
        values = values * trace.latent_scale[span].to(x.dtype)[:, None]
    constant = weights.value_constant(x.dtype)
    values = values if constant is None else values + constant
    if trace.value_ratio is not None:
        values = values * trace.value_ratio[span].to(x.dtype)
    return values.unflatten(-1, (-1, weights.head_dim))
