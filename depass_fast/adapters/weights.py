"""The weights of a layer as the engine sees them: branches that read the residual stream and write to it.

Every family is expressed in these terms (DESIGN.md section 2). A branch reads through a norm with its scale frozen, is
linear or an MLP in what it has read, and writes through a norm, if there is one, and a factor. Nothing here knows a
model; backends know nothing else of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .activation import Activation
from .keyed import WithEntries
from .maps import Latent, Linear, Norm
from .shift import Shift
from .spread import Spread
from .streams import SideMap

GATE = "embed"  # the name of a gate of the token's own embedding, among a layer's MLPs
SAME = "same"  # the name of experts that give back what they read, all of them together


@dataclass(frozen=True)
class Branch:
    """The common part of attention and MLP: the norm that they read through, and how they write.

    ``output`` is a norm on what is written (OLMo 2, Gemma 2), ``factor`` multiplies it (Granite), ``stream`` is a norm
    of the residual stream itself, after the branch has been added (OPT-350m). In front of it the sum is multiplied by
    ``keeps`` (MiniMax). With a ``front`` it reads a mixture of two positions (RWKV), which has the norm in it.
    ``spread`` carries what is written to later positions, too (Inkling).
    """

    norm: Norm | None
    output: Norm | None
    stream: Norm | None
    factor: float
    keeps: float
    spread: Spread | None = field(default=None, kw_only=True)
    front: Shift | None = field(default=None, kw_only=True)

    def read_of(self, resid: Tensor, offsets: np.ndarray) -> Tensor:
        """The residual stream (T, D) as it is in front of a norm: itself, or a mixture of two positions.

        ``offsets`` (P + 1,) are the first packed positions of the prompts.
        """
        return resid if self.front is None else self.front.of(resid, np.diff(offsets).tolist())

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
        y = y.to(dtype)
        if not self.output.is_factor:
            assert out_scale is not None  # it is recorded wherever there is an output norm
            y = y.expand(len(out_scale), -1)
        y = self.written(y, out_scale)
        return y if beta is None else y + beta

    @property
    def has_gated_norm(self) -> bool:
        """True if a gate by channel follows the norm that it reads through."""
        return self.norm is not None and self.norm.gate is not None

    @property
    def has_norm_bias(self) -> bool:
        norms = (self.norm, self.output, self.stream, None if self.front is None else self.front.norm)
        return any(norm is not None and norm.bias is not None for norm in norms)

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
    (``is_recurrent``), or values are keys (``is_keyed``). With ``scales_heads``, what the heads give is scaled by
    channel before ``o`` reads it. ``value_norm`` is a norm, without γ, of every head's values. ``source`` is the layer
    whose values, and keys, this one takes: its ``norm`` and ``v`` are that layer's, and read the residual stream
    entering it. ``reads`` multiplies what ``v`` reads, of one of two sides (:mod:`.side_by_side`).
    """

    v: Linear | Latent | WithEntries
    o: Linear
    head_dim: int
    key_dim: int
    value_limit: float | None = None
    conv: Linear | None = None
    is_recurrent: bool = False
    is_keyed: bool = False
    scales_heads: bool = False
    value_norm: Norm | None = None
    source: int | None = None
    reads: float = 1.0

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
        """The projection that reads the residual stream: V, the one down to the latent, or the first of several."""
        return self.v if isinstance(self.v, Linear) else self.v.down

    def values_of(self, outputs: Tensor) -> Tensor:
        """The values (N, Hkv·d) that the model computes from the outputs (N, C) of the module of ``v_input``."""
        values = self.v_input.select(outputs)
        values = self.v.of(values) if isinstance(self.v, Latent) else values
        if self.value_norm is not None:
            values = self.value_norm.normed(self._by_head(values)).flatten(-2)
        return values if self.value_limit is None else values.clamp(-self.value_limit, self.value_limit)

    def value_scales(self, outputs: Tensor) -> Tensor:
        """s of the norm of every head's values (N, Hkv), in float32 or wider; from the same outputs (N, C)."""
        assert self.value_norm is not None
        return self.value_norm.scale(self._by_head(self.v_input.select(outputs)))

    def _by_head(self, values: Tensor) -> Tensor:
        return values.unflatten(-1, (self.n_kv_heads, self.head_dim))

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
    ``name`` tells experts apart: `E0`, `E1`, ..., or `shared`; it is empty for the only MLP of a layer. `embed` is the
    gate of a token's own embedding (``follows``): it reads the residual stream that all others have been added to.
    `same` gives back what it reads (``is_linear``): all of its maps are the identity, and components do not meet there.
    ``source`` is the layer whose MLP's input it reads, through that one's norm, where it is an earlier one.
    """

    gate: Linear
    down: Linear
    name: str = ""
    up: Linear | None = None
    activation: Activation | None = None
    inner: Norm | None = None  # a norm between the activation and ``down``
    source: int | None = None

    @property
    def is_routed(self) -> bool:
        """True for an expert that gets only the positions that a router sends to it."""
        return self.name not in ("", "shared", GATE, SAME)

    @property
    def is_linear(self) -> bool:
        """True if it gives back what it reads, times a router's weight."""
        return self.name == SAME

    @property
    def is_dense(self) -> bool:
        """True if it is the layer's MLP itself: no expert that a router chooses, and no gate behind it."""
        return self.name in ("", "shared")

    @property
    def follows(self) -> bool:
        """True if it comes after the layer's other MLPs, as a gate of the token's own embedding does."""
        return self.name == GATE

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

    ``mlps`` is one MLP, or the experts of a mixture; they read the same and their outputs are summed, unless one
    ``follows`` the others. In a ``parallel`` layer the MLP reads what the attention reads. A layer may have no
    attention (None) or no MLP (none of ``mlps``).
    """

    attention: Attention  # None where there is none: most callers ask layers that have it
    mlps: tuple[Mlp, ...]
    parallel: bool = False
    side: SideMap | None = None  # a linear map beside attention, whose norms are frozen (LAuReL)

    @property
    def device(self) -> torch.device:
        return self.mlps[0].gate.device if self.attention is None else self.attention.o.device

    @property
    def mlp(self) -> Mlp:
        """The only MLP, or the first of several. Experts of one mixture have the same norms and factor."""
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
