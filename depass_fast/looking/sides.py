"""Queries and keys as linear maps of the residual stream, given the trace: norms, clamps and positions are frozen."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..adapters import Attention, Latent
from ..adapters.query_key import Projected
from ..runtime.products import product
from ..trace.turns import Turn


@dataclass(frozen=True)
class Side:
    """The queries, or the keys, of one layer at the N positions of a prompt, as an affine map of the residual stream.

    ``scale`` (N,) is that of the layer's norm, ``latent`` (N,) that of the norm of a latent (None without one),
    ``of_norm`` (N, H, 1) or (N, 1, 1) that of the norm of the heads, ``ratio`` (N, H, d) clamped / raw. ``constant``
    (N, H, d) is what does not come from the residual stream; None where that is nothing.
    """

    branch: Attention
    projected: Projected
    heads: int
    norm_is_last: bool
    turn: Turn
    scale: Tensor
    latent: Tensor | None
    of_norm: Tensor | None = None
    ratio: Tensor | None = None
    constant: Tensor | None = None

    def read(self, rows: Tensor, at: Tensor | slice) -> Tensor:
        """Return what ``rows`` (R, D) at positions ``at`` (R,) of the prompt add to queries or keys: (R, H, d)."""
        return self._behind(self._project(rows, at), at)

    def back(self, y: Tensor, heads: Tensor | slice | None = None) -> Tensor:
        """Apply the transpose: gradients (..., N, H, d) of queries or keys at all positions -> (..., N, D).

        With ``heads``, some of them, those of each head by itself: (..., h, N, D).
        """
        z = self.turn.back(self._normed_back(y) if self.norm_is_last else y)
        z = z if self.ratio is None else z * self.ratio
        z = z if self.norm_is_last else self._normed_back(z)
        own, shared = self.projected.own, self.projected.shared
        width = own.shape[0] // self.heads
        of_own, of_shared = z[..., :width], z[..., width:]
        of_own = of_own if self.latent is None else of_own * self.latent.to(z.dtype)[:, None, None]
        weight = own.weight.to(z.dtype)
        if heads is None:
            x, of_shared = product(of_own.flatten(-2), weight), of_shared.sum(-2)
        else:
            x = of_own[..., heads, :].transpose(-3, -2) @ weight.view(self.heads, width, -1)[heads]
            of_shared = of_shared[..., heads, :].transpose(-3, -2)
        if shared is not None:
            x = x + product(of_shared, shared.weight.to(z.dtype))
        norm = self.branch.norm
        return x if norm is None else norm.transposed(x, self.scale.to(x.dtype))

    def back_by_head(self, y: Tensor, which: Tensor) -> Tensor:
        """Take gradients (..., N, h, d) of keys back, each of h readers for itself: (..., h, N, D).

        ``which`` (h,) are the heads here whose keys they read. Those that share one go one after the other.
        """
        used, place = which.unique(return_inverse=True)
        order = (which[:, None] == which).tril(-1).sum(1)  # (h,) the number of earlier readers of the same
        z = y.new_zeros(*y.shape[:-3], int(order.max()) + 1, y.shape[-3], self.heads, y.shape[-1])
        for reader, (at, head) in enumerate(zip(order.tolist(), which.tolist(), strict=True)):
            z[..., at, :, head, :] = y[..., reader, :]
        found = self.back(z, used)  # (..., rounds, used, N, D)
        each = zip(order.tolist(), place.tolist(), strict=True)
        return torch.stack([found[..., at, head, :, :] for at, head in each], -3)

    def at(self, positions: Tensor | slice) -> Side:
        """Return the same at some of the positions."""
        held = ("scale", "latent", "of_norm", "ratio", "constant")
        parts = {name: None if (x := getattr(self, name)) is None else x[positions] for name in held}
        turn = self.turn._replace(a=self.turn.a[positions], b=self.turn.b[positions])
        return replace(self, turn=turn, **parts)

    def _project(self, rows: Tensor, at: Tensor | slice) -> Tensor:
        norm = self.branch.norm
        x = rows if norm is None else norm.apply(rows, self.scale[at])
        return self._projected(x, None if self.latent is None else self.latent[at])

    def _projected(self, x: Tensor, latent: Tensor | None) -> Tensor:
        """Return the projections (R, H, d) of normed rows, without their biases."""
        own, shared = self.projected.own, self.projected.shared
        z = product(x if latent is None else x * latent.to(x.dtype)[:, None], own.weight.to(x.dtype).T)
        z = z.unflatten(-1, (self.heads, -1))
        if shared is not None:
            behind = product(x, shared.weight.to(x.dtype).T)[:, None]
            z = torch.cat([z, behind.expand(-1, self.heads, -1)], -1)
        return z

    def _behind(self, z: Tensor, at: Tensor | slice) -> Tensor:
        """Take projections (R, H, d) on to attention, without constants."""
        z = z if self.norm_is_last else self._normed(z, at)
        z = z if self.ratio is None else z * self.ratio[at]
        z = self.turn.apply(z, at)
        return self._normed(z, at) if self.norm_is_last else z

    def _normed(self, z: Tensor, at: Tensor | slice) -> Tensor:
        norm = self.projected.norm
        if norm is None or self.of_norm is None:
            return z
        z = norm.centre(z) * self.of_norm[at].to(z.dtype)
        return z if norm.weight is None else z * norm.weight.to(z.dtype)

    def _normed_back(self, z: Tensor) -> Tensor:
        norm = self.projected.norm
        if norm is None or self.of_norm is None:
            return z
        z = z if norm.weight is None else z * norm.weight.to(z.dtype)
        return norm.centre(z * self.of_norm.to(z.dtype))


@dataclass(frozen=True)
class Sides:
    """One layer's queries and keys in one prompt: their maps, and what was recorded, q (N, H, d) and k (N, Hkv, d)."""

    of_q: Side
    of_k: Side
    q: Tensor
    k: Tensor
    off: float  # how far what the maps give is from that, relatively: the model's own rounding
    sink: Tensor | None = None  # (H,) logits of nothing; None where there are none

    @property
    def groups(self) -> int:
        """The number of heads that share a key."""
        return self.q.shape[1] // self.k.shape[1]


def frozen_at(side: Side, x: Tensor) -> Side:
    """Return the side as it is where the residual stream is ``x`` (N, D)."""
    return frozen(side.branch, side.projected, side.heads, side.turn, side.norm_is_last, x)


def frozen(branch: Attention, projected: Projected, heads: int, turn: Turn, last: bool, x: Tensor) -> Side:
    """Freeze one side at the residual stream ``x`` (N, D): pass by pass, as each scale is that of what comes to it."""
    side = Side(branch, projected, heads, last, turn, branch.scale(x), _latent_scale(branch, projected, x))
    every = slice(None)
    fixed = _fixed(branch, side, x.dtype)
    z = side._project(x, every)
    z = z if fixed is None else z + fixed
    norm, fields = projected.norm, {}
    own = None if fixed is None else fixed.expand_as(z)
    beta = None if norm is None or norm.bias is None else norm.bias.to(z)
    if norm is not None and not last:
        fields["of_norm"] = norm.scale(z).to(z.dtype)
        side = replace(side, **fields)
        z, own = side._normed(z, every), None if own is None else side._normed(own, every)
        z, own = (z, own) if beta is None else (z + beta, beta.expand_as(z) if own is None else own + beta)
    if (limit := branch.value_limit) is not None:
        ratio = torch.where(z.abs() > limit, limit / z.abs(), 1.0)
        fields["ratio"] = None if bool((ratio == 1).all()) else ratio
        if fields["ratio"] is not None:
            z, own = z * ratio, None if own is None else own * ratio
    z, own = turn.apply(z, every), None if own is None else turn.apply(own, every)
    if norm is not None and last:
        fields["of_norm"] = norm.scale(z).to(z.dtype)
        side = replace(side, **fields)
        own = None if own is None else side._normed(own, every)
        own = own if beta is None else (beta.expand_as(z) if own is None else own + beta)
    return replace(side, **fields, constant=own)


def _latent_scale(branch: Attention, projected: Projected, x: Tensor) -> Tensor | None:
    """Return the scale (N,) of the norm of a latent; its input is made again."""
    if not isinstance(projected.own, Latent):
        return None
    normed = x if branch.norm is None else branch.norm.apply(x, branch.scale(x))
    return projected.own.norm.scale(product(normed, projected.own.down.weight.to(x.dtype).T))


def _fixed(branch: Attention, side: Side, dtype: torch.dtype) -> Tensor | None:
    """Return the constant part (1, H, d) of the projections: their biases, and what they make of the norm's β."""
    parts = []
    if branch.norm is not None and branch.norm.bias is not None:
        if side.latent is not None:
            raise ValueError("model: its latent is behind a norm with a bias, which no component can carry.")
        parts.append(side._projected(branch.norm.bias.to(dtype)[None], None))
    own, shared = side.projected.own, side.projected.shared
    if own.bias is not None:
        assert shared is None  # a latent's projections have no biases
        parts.append(own.bias.to(dtype).view(1, side.heads, -1))
    return sum(parts[1:], parts[0]) if parts else None
