"""The weights of a layer as the engine sees them: branches that read the residual stream and write to it.

Every family is expressed in these terms (DESIGN.md section 2). A branch reads through a norm with its scale frozen, is
linear or an MLP in what it has read, and writes through a norm, if there is one, and a factor. Nothing here knows a
model; backends know nothing else of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from .activation import Activation
from .stored import Stacked, kind_of, stored_bias, stored_device, stored_shape, stored_weight


@dataclass(frozen=True)
class Norm:
    """A normalisation with its scale frozen: ``y = γ ⊙ (x - mean x) · s + β``, without the mean unless ``centred``.

    ``s[n] = 1 / sqrt(mean(x[n]²) + eps)``, of the centred x for LayerNorm. ``weight`` γ and ``bias`` β are (D,) or
    absent.
    """

    weight: Tensor | None
    eps: float
    bias: Tensor | None = None
    centred: bool = False

    def to(self, device: torch.device) -> Norm:
        """The same norm on another device."""
        parts = {name: getattr(self, name) for name in ("weight", "bias")}
        return replace(self, **{name: part if part is None else part.to(device) for name, part in parts.items()})

    def scale(self, x: Tensor) -> Tensor:
        """The frozen factor s of hidden states ``x`` (..., D) -> (...), in float32 or wider."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        return torch.rsqrt(x.square().mean(-1) + self.eps)

    def apply(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """The linear part, with ``scale`` (N,) frozen, or left out: (N, ..., D) -> (N, ..., D), in x's dtype."""
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        if scale is not None:
            x = x * scale.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
        return x if self.weight is None else self._weighted(x)

    def normed(self, x: Tensor) -> Tensor:
        """The norm of ``x`` (..., D) without β, its scale that of ``x`` itself, in x's dtype; fused on a GPU."""
        norm = nn.functional.layer_norm if self.centred else nn.functional.rms_norm
        y = norm(x, x.shape[-1:], eps=self.eps)
        return y if self.weight is None else self._weighted(y)

    def transposed(self, y: Tensor, scale: Tensor | None) -> Tensor:
        """Apply the transpose of :meth:`apply`, to gradients ``y`` (..., N, D) behind the norm."""
        y = y if self.weight is None else self._weighted(y)
        if scale is not None:
            y = y * scale.to(y.dtype)[..., None]
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

    def project(self, x: Tensor) -> Tensor:
        """The projection of (N, in) to (N, out), in x's dtype. A weight that is computed may be wider."""
        weight, bias = self.weight, self.bias
        return nn.functional.linear(x.to(weight), weight, None if bias is None else bias.to(weight)).to(x)


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


@dataclass(frozen=True)
class Branch:
    """The common part of attention and MLP: the norm that they read through, and how they write.

    ``output`` is a norm on what is written (OLMo 2, Gemma 2), ``factor`` multiplies it (Granite), ``stream`` is a norm
    of the residual stream itself, after the branch has been added (OPT-350m).
    """

    norm: Norm | None
    output: Norm | None
    stream: Norm | None
    factor: float

    def scale(self, resid: Tensor) -> Tensor:
        """The norm's scale s of the residual stream that is read, (T, D) -> (T,); ones without a norm."""
        if self.norm is None:
            return resid.new_ones(len(resid), dtype=torch.promote_types(resid.dtype, torch.float32))
        return self.norm.scale(resid)

    def reading(self, weight: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """A weight (C, D) on the normed input, as one on x · s, in ``dtype``; written to ``out`` if it is copied."""
        if self.norm is None:
            return weight.to(dtype)
        return self.norm.fold(weight, weight.new_empty(weight.shape, dtype=dtype) if out is None else out)

    def writing(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """A weight (D, C) of the output, with the output's γ, mean and factor in it, but not its scale."""
        weight = weight.to(dtype)
        if self.output is not None:
            weight = self.output.apply(weight.T, None).T
        return weight if self.factor == 1.0 else weight * self.factor

    def written(self, y: Tensor, out_scale: Tensor | None) -> Tensor:
        """The addition of raw outputs ``y`` (N, ..., D) to the residual stream, the output norm's scale (N,) frozen."""
        if self.output is not None:
            y = self.output.apply(y, out_scale)
        return y if self.factor == 1.0 else y * self.factor

    def written_transposed(self, y: Tensor, out_scale: Tensor | None) -> Tensor:
        """Apply the transpose of :meth:`written`, to gradients ``y`` (..., N, D) of the residual stream."""
        if self.output is not None:
            y = self.output.transposed(y, out_scale)
        return y if self.factor == 1.0 else y * self.factor

    def written_constant(self, y: Tensor | None, out_scale: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The addition of a constant raw output ``y`` (D,), (N, D) or None, and of the output norm's β: like ``y``."""
        if self.output is None:
            return None if y is None else self.written(y.to(dtype), None)
        beta = None if self.output.bias is None else self.output.bias.to(dtype) * self.factor
        if y is None:
            return beta
        assert out_scale is not None  # it is recorded wherever there is an output norm
        y = self.written(y.to(dtype).expand(len(out_scale), -1), out_scale)
        return y if beta is None else y + beta

    @property
    def has_norm_bias(self) -> bool:
        return any(norm is not None and norm.bias is not None for norm in (self.norm, self.output, self.stream))

    def _read_constant(self, weight: Callable[[], Tensor], bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The projection of the norm's β, plus the projection's own bias: (C,) or None."""
        if self.norm is None or self.norm.bias is None:
            return None if bias is None else bias.to(dtype)
        value = weight().to(dtype) @ self.norm.bias.to(dtype)
        return value if bias is None else value + bias.to(dtype)


@dataclass(frozen=True)
class Attention(Branch):
    """The OV path of one layer: ``v`` maps D to Hkv·d, ``o`` maps H·d to D. ``head_dim`` is d, that of values.

    ``key_dim`` is the width of a head's queries and keys. Values are clamped to ± ``value_limit``. ``conv`` convolves
    them along the positions, with taps (Hkv·d, K). A recurrence may stand in the place of the softmax
    (``is_recurrent``). With ``scales_heads``, what the heads give is scaled by channel before ``o`` reads it.
    """

    v: Linear | Latent
    o: Linear
    head_dim: int
    key_dim: int
    value_limit: float | None = None
    conv: Linear | None = None
    is_recurrent: bool = False
    scales_heads: bool = False

    @property
    def w_v(self) -> Tensor:
        return self.v.weight

    @property
    def w_o(self) -> Tensor:
        return self.o.weight

    @cached_property
    def n_heads(self) -> int:
        return self.o.shape[1] // self.head_dim

    @cached_property
    def n_kv_heads(self) -> int:
        return self.v.shape[0] // self.head_dim

    @property
    def has_bias(self) -> bool:
        of_conv = self.conv is not None and self.conv.has_bias
        return self.has_norm_bias or self.v.has_bias or self.o.has_bias or of_conv

    @property
    def v_input(self) -> Linear:
        """The projection that reads the residual stream: V, or the one down to the latent."""
        return self.v.down if isinstance(self.v, Latent) else self.v

    def values_of(self, outputs: Tensor) -> Tensor:
        """The values (N, Hkv·d) that the model computes from the outputs (N, C) of the module of ``v_input``."""
        values = self.v_input.select(outputs)
        values = self.v.of(values) if isinstance(self.v, Latent) else values
        return values if self.value_limit is None else values.clamp(-self.value_limit, self.value_limit)

    def clamped_ratio(self, outputs: Tensor) -> Tensor:
        """Clamped / raw values (N, Hkv·d), one where a value is within the limit; from the same outputs (N, C)."""
        raw = self.v_input.select(outputs)
        assert self.value_limit is not None
        return torch.where(raw.abs() > self.value_limit, self.value_limit / raw.abs(), 1.0)

    def value_constant(self, dtype: torch.dtype) -> Tensor | None:
        """The constant part of every value, (Hkv·d,), or None."""
        return self._read_constant(lambda: self.w_v, self.v.bias, dtype)

    def constant(
        self, dtype: torch.dtype, out_scale: Tensor | None = None, row_sum: Tensor | None = None
    ) -> Tensor | None:
        """The constant that every position receives, whatever its components are: (D,), or (N, D), or None.

        P's rows sum to ``row_sum`` (N, H), or to one.
        """
        value, raw = self.value_constant(dtype), self.o.bias
        if value is not None:
            groups = self.n_heads // self.n_kv_heads
            value = value.view(self.n_kv_heads, 1, self.head_dim).expand(-1, groups, -1).reshape(self.n_heads, -1)
            if row_sum is not None:
                value = row_sum.to(dtype)[..., None] * value  # (N, H, d)
            value = value.flatten(-2) @ self.w_o.to(dtype).T
            raw = value if raw is None else value + raw.to(dtype)
        return self.written_constant(raw, out_scale, dtype)


@dataclass(frozen=True)
class Mlp(Branch):
    """An MLP, or one expert of several: ``gate`` and ``up`` map D to I, ``down`` maps ``activation`` of both back.

    An ungated MLP has no ``up``: ``gate`` is its only way in. A fork may keep ``up`` and ``activation`` elsewhere than
    its family; they are None then, and only the rules that need them refuse it (``Adapter.check_linear_rule``).
    ``name`` tells experts apart: `E0`, `E1`, ..., or `shared`; it is empty for the only MLP of a layer.
    """

    gate: Linear
    down: Linear
    name: str = ""
    up: Linear | None = None
    activation: Activation | None = None

    @property
    def is_routed(self) -> bool:
        """True for an expert that gets only the positions that a router sends to it."""
        return self.name not in ("", "shared")

    @property
    def w_gate(self) -> Tensor:
        return self.gate.weight

    @property
    def w_up(self) -> Tensor:
        assert self.up is not None  # the MLP is gated
        return self.up.weight

    @property
    def w_down(self) -> Tensor:
        return self.down.weight

    @property
    def has_bias(self) -> bool:
        projections = (linear for linear in (self.gate, self.up, self.down) if linear is not None)
        return self.has_norm_bias or any(linear.has_bias for linear in projections)

    def gate_constant(self, dtype: torch.dtype) -> Tensor | None:
        """The constant part of every gate, which the `bias` component drives beside its own state: (I,), or None."""
        return self._read_constant(lambda: self.w_gate, self.gate.bias, dtype)

    def up_constant(self, dtype: torch.dtype) -> Tensor | None:
        """The constant part of every up projection: (I,), or None. The activation's offset is not in it."""
        return None if self.up is None else self._read_constant(lambda: self.w_up, self.up.bias, dtype)


@dataclass(frozen=True)
class Layer:
    """All weights of one layer that propagate components.

    ``mlps`` is one MLP, or the experts of a mixture; they read the same and their outputs are summed. In a ``parallel``
    layer the MLP reads what the attention reads. A layer may have no attention (None) or no MLP (none of ``mlps``).
    """

    attention: Attention  # None where there is none: most callers ask layers that have it
    mlps: tuple[Mlp, ...]
    parallel: bool = False

    @property
    def device(self) -> torch.device:
        return self.mlps[0].gate.device if self.attention is None else self.attention.v.device

    @property
    def mlp(self) -> Mlp:
        """The only MLP, or one of them: norms and factor are the same in all."""
        return self.mlps[0]

    @property
    def is_own(self) -> bool:
        """True if all weights are the model's own tensors, none computed when it is read."""
        mlps = (linear for mlp in self.mlps for linear in (mlp.gate, mlp.up, mlp.down) if linear is not None)
        mixing = () if self.attention is None else (self.attention.v, self.attention.o)
        return all(linear.is_own for linear in (*mixing, *mlps))

    @property
    def has_mlp_bias(self) -> bool:
        return any(mlp.has_bias for mlp in self.mlps)
