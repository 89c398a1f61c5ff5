"""The frozen linear maps of one layer, and their transposes: all that the adjoint sweep knows of a layer's arithmetic.

Rows are (R, Q, D): R components (or gradients) at Q positions of one prompt. With everything non-linear frozen, a
layer is attention (norm scale, V, P, O), the way to the gates (norm scale, W_gate) and back (W_down); the allocation
between these two is the only place where components meet, and lies with the callers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from ..adapters import Branch, Layer, Mlp, Norm
from ..backends.torch.attention import FrozenAttention
from ..runtime.products import product
from ..trace.record import LayerTrace, MlpTrace

_TILE = 1 << 26  # elements of the probabilities that are held at once


class LayerMaps:
    """One layer at the first N positions of a prompt, ``span`` of the trace; it writes at ``queries`` (Q of them) only.

    GEMMs run in ``compute``, everything else, and what is returned, is in ``dtype`` (float32 or float64). The neurons
    are those of the MLP, or of all experts that anything was sent to, whose activations are zero elsewhere.
    """

    fused: ClassVar[bool] = False  # kernels do what :mod:`.fused` says

    def __init__(
        self,
        layer: Layer,
        record: LayerTrace,
        span: slice,
        queries: slice,
        dtype: torch.dtype,
        compute: torch.dtype,
    ) -> None:
        self.device, self.queries, self.dtype, self.compute = layer.device, queries, dtype, compute
        self.parallel = layer.parallel
        self._attention, self._mlp, self._mlps = layer.attention, layer.mlp, layer.mlps
        self._record, self._span = record, span
        self._read_attention()
        self._read_mlp()
        self.borrows = layer.is_own and self._uses_the_models_weights()  # no copies of weights
        self.attention_constant = self._attention_constant()  # (D,), (Q, D) or None, as is the next; both for `bias`,
        self.mlp_constant = record.mlp_constant(self._mlps, self._packed, dtype)  # before the stream's own norm

    def _read_attention(self) -> None:
        attention, record = self._attention, self._record.attention
        self._kv, self._groups = attention.n_kv_heads, attention.n_heads // attention.n_kv_heads
        self._attention_norm = self._norm(attention.norm)
        self._w_v, self._w_o = attention.w_v.to(self.compute), attention.writing(attention.w_o, self.compute)
        ratio = record.value_ratio
        self._value_ratio = None if ratio is None else ratio[self._span].to(self.compute)  # (N, Hkv·d)
        scale = self.scales(attention, record.resid, self.dtype)  # (T,)
        scale = scale if record.latent_scale is None else scale * record.latent_scale.to(scale)
        self._frozen = FrozenAttention(record, self._span, scale, _TILE, self.compute)

    def _read_mlp(self) -> None:
        mlp, record, dtype, queries = self._mlp, self._record.mlp, self.dtype, self.queries
        self._mlp_norm = self._norm(mlp.norm)
        parts = [(self._mlps[part.part], part) for part in self._record.mlps]
        self._w_gate = _joined([weights.w_gate.to(self.compute) for weights, _ in parts])
        self._w_down = _joined([weights.writing(weights.w_down, self.compute) for weights, _ in parts], 1)
        gates = [self._recorded(part.dense(part.gate, self._span)[queries]) for _, part in parts]
        activations = [self._recorded(part.dense(part.act, self._span)[queries]) for _, part in parts]
        self.gate_total, self.act = _joined(gates, 1), _joined(activations, 1)  # (Q, I)
        if record.out_scale is not None:
            self.act = self.act * record.out_scale[self._span][queries, None].to(dtype)
        self.mlp_scale = self.scales(mlp, record.resid[self._span][queries], dtype)[:, None]  # s at the queries, (Q, 1)
        self.gate_constant = _gate_constant(parts, dtype)  # (I,) or None

    def _uses_the_models_weights(self) -> bool:
        attention, mlp = self._attention, self._mlp
        used = (
            (self._w_v, attention.v.weight),
            (self._w_o, attention.o.weight),
            (self._w_gate, mlp.gate.weight),
            (self._w_down, mlp.down.weight),
        )
        return all(mine.data_ptr() == weight.data_ptr() for mine, weight in used)

    def _norm(self, norm: Norm | None) -> Norm | None:
        """Return a norm with γ in ``dtype``, so that it is not converted at every use."""
        return norm if norm is None or norm.weight is None else replace(norm, weight=norm.weight.to(self.dtype))

    def _recorded(self, x: Tensor) -> Tensor:
        """Return gates or activations (Q, I) of the trace in ``dtype``."""
        return x.to(self.dtype)

    @property
    def _packed(self) -> slice:
        """The queries among all packed positions of the trace."""
        return slice(self._span.start + self.queries.start, self._span.start + self.queries.stop)

    @staticmethod
    def scales(module: Branch, resid: Tensor, dtype: torch.dtype) -> Tensor:
        """Return s of a module's norm for the residual stream (T, D) that it reads: (T,), in ``dtype``."""
        return module.scale(resid.to(dtype)).to(dtype)

    def add_attention(self, x: Tensor) -> Tensor:
        """Return rows with what attention adds to them: (R, N, D) -> (R, Q, D). The given ones may be used up."""
        return x[:, self.queries] + self.ov(x)

    def ov(self, x: Tensor) -> Tensor:
        """Return what attention adds: (R, N, D) -> (R, Q, D)."""
        return self._written(self._mixed(product(_linear(self._attention_norm, x).to(self.compute), self._w_v.T)))

    def _written(self, heads: Tensor) -> Tensor:
        return product(heads, self._w_o.T).to(self.dtype)

    def _mixed(self, values: Tensor) -> Tensor:
        """Return values (R, N, Hkv·d), without s, after P: (R, Q, H·d)."""
        return self._through_p(values if self._value_ratio is None else values * self._value_ratio)

    def _through_p(self, values: Tensor) -> Tensor:
        """Apply P · s to values (R, N, Hkv·d) -> (R, Q, H·d)."""
        r, n, _ = values.shape
        values = values.view(r, n, self._kv, -1).permute(2, 1, 0, 3).reshape(self._kv, n, -1)  # (Hkv, N, R·d)
        q = self.queries.stop - self.queries.start
        only = self._only
        if only is not None:
            out = torch.bmm(only.flatten(1, 2), values)
        else:
            out = values.new_empty(self._kv, self._groups, q, values.shape[2])
            for heads, first, last, p in self._tiles():
                mixed = torch.bmm(p.flatten(1, 2), values[heads, : p.shape[3]])
                out[heads, :, first:last] = mixed.view(p.shape[0], self._groups, last - first, -1)
        return out.view(self._kv, self._groups, q, r, -1).permute(3, 2, 0, 1, 4).reshape(r, q, -1)

    def ov_transposed(self, y: Tensor) -> Tensor:
        """Apply the transpose of :meth:`ov`: (R, Q, D) -> (R, N, D)."""
        out = self._values_transposed(product(y.to(self.compute), self._w_o))
        return _linear_transposed(self._attention_norm, product(out, self._w_v).to(self.dtype))

    def _values_transposed(self, y: Tensor) -> Tensor:
        """Apply the transpose of :meth:`_mixed`: (R, Q, H·d) -> (R, N, Hkv·d)."""
        out = self._through_p_transposed(y)
        return out if self._value_ratio is None else out * self._value_ratio[: self.queries.stop]

    def _through_p_transposed(self, y: Tensor) -> Tensor:
        """Apply the transpose of :meth:`_through_p`: (R, Q, H·d) -> (R, N, Hkv·d)."""
        r, q, _ = y.shape
        y = y.view(r, q, self._kv, self._groups, -1).permute(2, 3, 1, 0, 4)
        y = y.reshape(self._kv, self._groups, q, -1)  # (Hkv, G, Q, R·d)
        n = self.queries.stop
        only = self._only
        if only is not None:
            out = torch.bmm(only.flatten(1, 2).transpose(1, 2), y.flatten(1, 2))
        else:
            out = y.new_zeros(self._kv, n, y.shape[3])
            for heads, first, last, p in self._tiles():
                part = y[heads, :, first:last].reshape(p.shape[0], -1, y.shape[3])
                out[heads, : p.shape[3]] += torch.bmm(p.flatten(1, 2).transpose(1, 2), part)
        return out.view(self._kv, n, r, -1).permute(2, 1, 0, 3).reshape(r, n, -1)

    def gates(self, x: Tensor, at: slice = slice(None)) -> Tensor:
        """Return the gates of rows at some of the queries, without the constant of `bias`: (R, Q, D) -> (R, Q, I)."""
        x = _linear(self._mlp_norm, x) * self.mlp_scale[at]
        return product(x.to(self.compute), self._w_gate.T).to(self.dtype)

    def largest_gates(self, x: Tensor, amounts: Tensor, out: Tensor, budget: int) -> None:
        """Write the largest |gate| of each row at any query: rows (R, D), and how much of them lies where, (Q, R) ≥ 0.

        ``budget`` bounds the gates held at once, in bytes.
        """
        size = max(1, budget // (len(self._w_gate) * self.compute.itemsize))
        x = self._unscaled(x)
        for first in range(0, len(x), size):
            part = slice(first, first + size)
            self._largest(product(x[part], self._w_gate.T), amounts[:, part], out[part])

    def _largest(self, gates: Tensor, amounts: Tensor, out: Tensor) -> None:
        """Write the largest |gate| of rows, (R, I) times the norm's scale, which are used up."""
        torch.mul(gates.abs_().amax(1), (amounts * self.mlp_scale).amax(0), out=out)

    def _unscaled(self, x: Tensor) -> Tensor:
        """Return rows (R, D) through the norm before the MLP, without its scale, in the products' dtype."""
        return _linear(self._mlp_norm, x).to(self.compute)

    def gates_transposed(self, y: Tensor) -> Tensor:
        """Apply the transpose of :meth:`gates`: (R, Q, I) -> (R, Q, D)."""
        y = product(y.to(self.compute), self._w_gate).to(self.dtype) * self.mlp_scale
        return _linear_transposed(self._mlp_norm, y)

    def down(self, y: Tensor) -> Tensor:
        """Return what neurons write: (R, Q, I) -> (R, Q, D)."""
        return product(y.to(self.compute), self._w_down.T).to(self.dtype)

    def down_transposed(self, x: Tensor) -> Tensor:
        """Apply the transpose of :meth:`down`: (R, Q, D) -> (R, Q, I)."""
        return product(x.to(self.compute), self._w_down).to(self.dtype)

    def normed(self, x: Tensor, module: str, transposed: bool = False) -> Tensor:
        """Apply the stream's own norm behind "attention" or "mlp", or its transpose, if there is one: (R, Q, D)."""
        norm = (self._attention if module == "attention" else self._mlp).stream
        if norm is None:
            return x
        resid = self._record.attention_sum if module == "attention" else self._record.mlp_sum
        scale = norm.frozen_scale(None if resid is None else resid[self._span][self.queries], self.dtype)
        x = x if scale is None else x * scale.to(self.dtype)[:, None]
        return _linear_transposed(norm, x) if transposed else _linear(norm, x)

    def _attention_constant(self) -> Tensor | None:
        """Return what `bias` receives of attention, in the stream before its own norm."""
        attention, record, at = self._attention, self._record.attention, self._packed
        value = None if self._value_ratio is None else attention.value_constant(self.dtype)
        if value is None:
            return record.constant(attention, at, self.dtype)
        values = (value / self._frozen.scale[:, None].to(value)).to(self.compute)
        mixed = self._written(self._mixed(values[None]))[0]  # clamped
        scale = None if record.out_scale is None else record.out_scale[at]
        written = attention.written_constant(attention.o.bias, scale, self.dtype)
        return mixed if written is None else mixed + written

    def stream_bias(self, module: str) -> Tensor | None:
        """Return β of the stream's own norm behind a module: (D,) or None."""
        norm = (self._attention if module == "attention" else self._mlp).stream
        return None if norm is None or norm.bias is None else norm.bias.to(self.dtype)

    def sees(self) -> Tensor:
        """Return the positions from which each query receives anything: (Q, N) bool."""
        shape = self.queries.stop - self.queries.start, self.queries.stop
        seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
        for _, first, last, p in self._tiles():
            seen[first:last, : p.shape[3]] |= (p > 0).flatten(0, 1).any(0)
        return seen

    def _tiles(self) -> Iterator[tuple[slice, int, int, Tensor]]:
        """Yield KV heads, first and last (excluded) of the queries, and their P · s (h, G, Q, K)."""
        if self._only is None:
            yield from self._frozen.walk(0)
        else:
            yield slice(0, self._kv), 0, self._only.shape[2], self._only

    @cached_property
    def _only(self) -> Tensor | None:
        """All of P · s (Hkv, G, Q, N) if that is one tile, else None."""
        if self.queries.start == 0:
            return self._frozen.only
        return self._frozen.probabilities(slice(0, self._kv), self.queries)


def _joined(parts: list[Tensor], dim: int = 0) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _gate_constant(parts: Sequence[tuple[Mlp, MlpTrace]], dtype: torch.dtype) -> Tensor | None:
    """Return the gates' biases (I,), zero for the experts that have none; None where no part has one."""
    constants = [weights.gate_constant(dtype) for weights, _ in parts]
    if all(constant is None for constant in constants):
        return None
    zeros = [part.gate.new_zeros(part.gate.shape[1], dtype=dtype) for _, part in parts]
    return _joined([zero if constant is None else constant for zero, constant in zip(zeros, constants, strict=True)])


def _linear(norm: Norm | None, x: Tensor) -> Tensor:
    """Return γ ⊙ (x - mean x): a norm without its scale."""
    return x if norm is None else norm.apply(x, None)


def _linear_transposed(norm: Norm | None, y: Tensor) -> Tensor:
    """Apply the transpose of :func:`_linear`."""
    return y if norm is None else norm.transposed(y, None)
