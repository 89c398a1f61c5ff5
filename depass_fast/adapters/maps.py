"""Linear maps of a model with everything else frozen: norms, projections, and the way of values through a latent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from .stored import Stacked, kind_of, stored_bias, stored_device, stored_shape, stored_weight


@dataclass(frozen=True)
class Norm:
    """A normalisation with its scale frozen: ``y = γ ⊙ (x - mean x) · s + β``, without the mean unless ``centred``.

    ``s[n] = 1 / sqrt(mean(x[n]²) + eps)``, of the centred x for LayerNorm. ``weight`` γ and ``bias`` β are (D,) or
    absent. With ``is_factor`` there is no s: γ, (1,) or (D,), multiplies what passes. ``gate`` gives factors of y by
    channel, (..., D) of (..., D); they are frozen with s, whose shape is then (N, D).
    """

    weight: Tensor | None
    eps: float
    bias: Tensor | None = None
    centred: bool = False
    is_factor: bool = False
    gate: Callable[[Tensor], Tensor] | None = None

    def to(self, device: torch.device) -> Norm:
        """The same norm on another device."""
        parts = {name: getattr(self, name) for name in ("weight", "bias")}
        return replace(self, **{name: part if part is None else part.to(device) for name, part in parts.items()})

    def scale(self, x: Tensor) -> Tensor:
        """The frozen factor s of hidden states ``x`` (..., D) -> (...), or (..., D) with a gate; float32 or wider."""
        wide = torch.promote_types(x.dtype, torch.float32)
        if self.is_factor:
            return x.new_ones(x.shape[:-1], dtype=wide)
        x = x.to(wide)
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        s = torch.rsqrt(x.square().mean(-1) + self.eps)
        if self.gate is None:
            return s
        y = x * s[..., None]
        return s[..., None] * self.gate(y if self.weight is None else self._weighted(y)).to(s)

    def frozen_scale(self, resid: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The scale of hidden states (N, D) that were recorded; None for a factor, of which none are."""
        if self.is_factor:
            return None
        assert resid is not None  # it is recorded wherever there is such a norm
        return self.scale(resid.to(dtype))

    def apply(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """The linear part, with ``scale`` (N,) or (N, D) frozen, or left out: (N, ..., D) -> the same, in x's dtype."""
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        if scale is not None:
            x = x * scale.to(x.dtype).view(len(scale), *[1] * (x.ndim - scale.ndim), *scale.shape[1:])
        return x if self.weight is None else self._weighted(x)

    def normed(self, x: Tensor) -> Tensor:
        """The norm of ``x`` (..., D) without β, its scale that of ``x`` itself, in x's dtype; fused on a GPU."""
        if self.is_factor:
            return x if self.weight is None else self._weighted(x)
        norm = nn.functional.layer_norm if self.centred else nn.functional.rms_norm
        y = norm(x, x.shape[-1:], eps=self.eps)
        y = y if self.weight is None else self._weighted(y)
        return y if self.gate is None else y * self.gate(y).to(y)

    def transposed(self, y: Tensor, scale: Tensor | None) -> Tensor:
        """Apply the transpose of :meth:`apply`, to gradients ``y`` (..., N, D) behind the norm."""
        y = y if self.weight is None else self._weighted(y)
        if scale is not None:
            y = y * (scale.to(y.dtype) if self.gate is not None else scale.to(y.dtype)[..., None])
        return y - y.mean(-1, keepdim=True) if self.centred else y

    def _weighted(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        narrower = torch.promote_types(x.dtype, self.weight.dtype) == x.dtype  # the product widens it by itself
        return x * (self.weight if narrower else self.weight.to(x.dtype))

    def fold(self, weight: Tensor, out: Tensor) -> Tensor:
        """Turn a ``weight`` (C, D) on the normed x into one on x · s, in ``out``: γ and the mean go into it."""
        if self.weight is not None and weight.dtype == out.dtype:
            torch.mul(weight, self.weight.to(out.dtype), out=out)
        else:
            out.copy_(weight)
            if self.weight is not None:
                out.mul_(self.weight.to(out.dtype))
        return out.sub_(out.mean(1, keepdim=True)) if self.centred else out


def mixing_norms(keeps: Tensor, factor: Tensor, constant: Tensor | None) -> tuple[Norm, Norm]:
    """Factors of what a branch adds and of the stream behind it, for ``keeps`` ⊙ x + ``factor`` ⊙ y + ``constant``.

    All are (D,), and ``keeps`` is nowhere zero. x is the residual stream, y what the branch gives.
    """
    wide = torch.promote_types(keeps.dtype, torch.float32)
    keeps, factor = keeps.to(wide), factor.to(wide)
    return Norm(factor / keeps, 0.0, is_factor=True), Norm(keeps, 0.0, constant, is_factor=True)


@dataclass(frozen=True)
class Linear:
    """A projection of the model, or a part of a fused one: ``weight`` (out, in), ``bias`` (out,) or None."""

    module: nn.Module | Stacked
    part: Callable[[Tensor], Tensor] | None = None  # selects this projection's outputs, which are the first axis
    outer_bias: Tensor | None = None  # added after the module, which does not know of it
    keeps_bias: bool = True  # False: the bias is left out, see depass_fast.adapters.biasless

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(out, in), without reading the weight."""
        shape = stored_shape(self.module)
        if self.part is None:
            return shape
        out, size = self.part(torch.empty(shape, device="meta")).shape
        return out, size

    @property
    def device(self) -> torch.device:
        return stored_device(self.module)

    @cached_property
    def weight(self) -> Tensor:
        weight = stored_weight(self.module)
        return weight if self.part is None else self.part(weight)

    @cached_property
    def bias(self) -> Tensor | None:
        if not self.keeps_bias:
            return None
        bias = stored_bias(self.module)
        bias = bias if bias is None or self.part is None else self.part(bias).contiguous()
        return self.outer_bias if bias is None else bias if self.outer_bias is None else bias + self.outer_bias

    @property
    def has_bias(self) -> bool:
        return self.keeps_bias and not (stored_bias(self.module) is None and self.outer_bias is None)

    @property
    def is_own(self) -> bool:
        """True if the weight is the model's own tensor, so that holding it costs nothing."""
        return kind_of(self.module) is None

    @property
    def is_fused(self) -> bool:
        """True if the module computes other projections beside this one."""
        return self.part is not None

    def select(self, outputs: Tensor) -> Tensor:
        """This projection's part of what the module outputs: (N, C) -> (N, out)."""
        return outputs if self.part is None else self.part(outputs.T).T

    def entering(self, x: Tensor) -> Tensor:
        """The input of the module itself, given that of this projection: the same, unless another one is in front."""
        return x

    def project(self, x: Tensor) -> Tensor:
        """The projection of (N, in) to (N, out), in x's dtype. A weight that is computed may be wider."""
        weight, bias = self.weight, self.bias
        return nn.functional.linear(x.to(weight), weight, None if bias is None else bias.to(weight)).to(x)


@dataclass(frozen=True)
class Made(Linear):
    """A map whose weight no module holds as it is: it is made when it is read. It has no constant."""

    @cached_property
    def bias(self) -> None:
        return None

    @property
    def has_bias(self) -> bool:
        return False

    @property
    def is_own(self) -> bool:
        return False


@dataclass(frozen=True)
class Joined(Made):
    """Two projections of the same input, the outputs of ``second`` behind the others: ``part`` takes both together.

    The module is that of the first. No output of the model's holds both.
    """

    second: nn.Module | None = None

    @property
    def modules(self) -> list[nn.Module]:
        return [one for one in (self.module, self.second) if isinstance(one, nn.Module)]

    @cached_property
    def shape(self) -> tuple[int, int]:
        out, size = sum(stored_shape(one)[0] for one in self.modules), stored_shape(self.module)[1]
        both = torch.empty(out, size, device="meta")
        return both.shape if self.part is None else self.part(both).shape  # pyright: ignore[reportReturnType]

    @cached_property
    def weight(self) -> Tensor:
        both = torch.cat([stored_weight(one) for one in self.modules])
        return both if self.part is None else self.part(both)


@dataclass(frozen=True)
class Taps(Made):
    """A convolution whose taps (C, 1, K) no module holds; ``module`` is any that lies where it is."""

    taps: Tensor | None = None

    @cached_property
    def weight(self) -> Tensor:
        assert self.taps is not None
        return self.taps if self.part is None else self.part(self.taps)

    @cached_property
    def shape(self) -> tuple[int, int]:
        return len(self.weight), 1


@dataclass(frozen=True)
class PassesOn(Linear):
    """A convolution whose input is added to what it gives: its last tap (C, 1, K) is one more."""

    @cached_property
    def weight(self) -> Tensor:
        weight = stored_weight(self.module)
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)
        weight[..., -1] += 1.0
        return weight if self.part is None else self.part(weight)

    @property
    def is_own(self) -> bool:
        return False


@dataclass(frozen=True)
class Latent:
    """Values by way of a latent (multi-head latent attention): ``up`` (Hkv·d, r) of the norm of ``down`` (r, D).

    ``weight`` is one matrix for all of it, with the norm's γ in it and without its scale. There are no constants.
    """

    down: Linear
    norm: Norm
    up: Linear

    bias: ClassVar[None] = None
    has_bias: ClassVar[bool] = False
    is_own: ClassVar[bool] = False  # its weight is made when it is read

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    @property
    def device(self) -> torch.device:
        return self.down.device

    @cached_property
    def weight(self) -> Tensor:
        up, down = self.up.weight, self.down.weight
        wide = torch.promote_types(up.dtype, torch.float32)
        return (self.norm.apply(up.to(wide), None) @ down.to(wide)).to(up.dtype)

    def of(self, down: Tensor) -> Tensor:
        """The values (N, Hkv·d) that the model computes from the latent ``down`` (N, r), before its norm."""
        wide = down.to(torch.promote_types(down.dtype, torch.float32))
        return self.norm.apply(wide, self.norm.scale(wide)) @ self.up.weight.to(wide).T
