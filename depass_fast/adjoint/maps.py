"""The frozen linear maps of one layer, and their transposes: all that the adjoint sweep knows of a layer's arithmetic.

Rows are (R, Q, D): R components (or gradients) at Q positions of one prompt. With everything non-linear frozen, a
layer is attention (norm scale, V, P, O), the way to the gates (norm scale, W_gate) and back (W_down); the allocation
between these two is the only place where components meet, and lies with the callers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..adapters import Adapter, Layer
from ..backends.attention import FrozenAttention
from ..trace import LayerTrace, Trace

_TILE = 1 << 26  # probabilities held at once, in elements
_KEPT = 1 << 28  # and between the ways there and back, of all layers


class LayerMaps:
    """One layer at the first N positions of a prompt, ``span`` of the trace; it writes at ``queries`` (Q of them) only.

    GEMMs run in ``compute``, everything else, and what is returned, is in ``dtype`` (float32 or float64).
    """

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
        attention, mlp = layer.attention, layer.mlp
        self._kv, self._groups = attention.n_kv_heads, attention.n_heads // attention.n_kv_heads
        self._w_v, self._w_o = attention.w_v.to(compute), attention.w_o.to(compute)
        self._w_gate, self._w_down = mlp.w_gate.to(compute), mlp.w_down.to(compute)
        self._gamma = attention.norm.weight.to(dtype)
        before, after = record.resid_pre[span], record.resid_mid[span][queries]
        q, k = record.attention.q[span], record.attention.k[span]
        scale = attention.norm.scale(before.to(dtype))  # (N,)
        self._frozen = FrozenAttention(q, k, record.attention, scale, _TILE, compute)
        self._mlp_scale = mlp.norm.scale(after.to(dtype)).to(dtype)[:, None] * mlp.norm.weight.to(dtype)  # (Q, D)
        self.resid_mid = after.to(dtype)  # (Q, D)
        self.gate_total = record.gate[span][queries].to(dtype)  # (Q, I)
        self.act = record.act[span][queries].to(dtype)  # (Q, I)
        self.attention_constant = attention.constant(dtype)  # (D,) or None, as are the next two
        self.gate_constant = mlp.gate_constant(dtype)  # (I,)
        self.mlp_constant = mlp.constant(dtype)

    def ov(self, x: Tensor) -> Tensor:
        """What attention adds: (R, N, D) -> (R, Q, D)."""
        r, n, _ = x.shape
        values = (x * self._gamma).to(self.compute) @ self._w_v.T
        values = values.view(r, n, self._kv, -1).permute(2, 1, 0, 3).reshape(self._kv, n, -1)  # (Hkv, N, R·d)
        q = self.queries.stop - self.queries.start
        out = values.new_empty(self._kv, self._groups, q, values.shape[2])
        for heads, first, last, p in self._tiles():
            mixed = torch.bmm(p.flatten(1, 2), values[heads, : p.shape[3]])
            out[heads, :, first:last] = mixed.view(p.shape[0], self._groups, last - first, -1)
        out = out.view(self._kv, self._groups, q, r, -1).permute(3, 2, 0, 1, 4).reshape(r, q, -1)
        return (out @ self._w_o.T).to(self.dtype)

    def ov_transposed(self, y: Tensor) -> Tensor:
        """The transpose of :meth:`ov`: (R, Q, D) -> (R, N, D)."""
        r, q, _ = y.shape
        y = (y.to(self.compute) @ self._w_o).view(r, q, self._kv, self._groups, -1).permute(2, 3, 1, 0, 4)
        y = y.reshape(self._kv, self._groups, q, -1)  # (Hkv, G, Q, R·d)
        n = self.queries.stop
        out = y.new_zeros(self._kv, n, y.shape[3])
        for heads, first, last, p in self._tiles():
            part = y[heads, :, first:last].reshape(p.shape[0], -1, y.shape[3])
            out[heads, : p.shape[3]] += torch.bmm(p.flatten(1, 2).transpose(1, 2), part)
        out = out.view(self._kv, n, r, -1).permute(2, 1, 0, 3).reshape(r, n, -1)
        return (out @ self._w_v).to(self.dtype) * self._gamma

    def gates(self, x: Tensor, at: slice = slice(None)) -> Tensor:
        """g of rows (R, Q, D) -> (R, Q, I), without the constant that belongs to `bias`; at some of the queries."""
        return ((x * self._mlp_scale[at]).to(self.compute) @ self._w_gate.T).to(self.dtype)

    def gates_transposed(self, y: Tensor) -> Tensor:
        """The transpose of :meth:`gates`: (R, Q, I) -> (R, Q, D)."""
        return (y.to(self.compute) @ self._w_gate).to(self.dtype) * self._mlp_scale

    def down(self, y: Tensor) -> Tensor:
        """What neurons write: (R, Q, I) -> (R, Q, D)."""
        return (y.to(self.compute) @ self._w_down.T).to(self.dtype)

    def down_transposed(self, x: Tensor) -> Tensor:
        """The transpose of :meth:`down`: (R, Q, D) -> (R, Q, I)."""
        return (x.to(self.compute) @ self._w_down).to(self.dtype)

    def sees(self) -> Tensor:
        """Which positions each query receives anything from: (Q, N) bool."""
        seen = torch.zeros(self.queries.stop - self.queries.start, self.queries.stop, dtype=torch.bool)
        seen = seen.to(self.device)
        for _, first, last, p in self._tiles():
            seen[first:last, : p.shape[3]] |= (p > 0).flatten(0, 1).any(0)
        return seen

    def _tiles(self) -> Iterator[tuple[slice, int, int, Tensor]]:
        """KV heads, first and last (excluded) of the queries, and P · s (h, G, Q, K) of them."""
        if self.queries.start == 0:
            yield from self._frozen.walk(0)
        else:
            p = self._frozen.probabilities(slice(None), self.queries)
            yield slice(0, self._kv), 0, p.shape[2], p


class Road:
    """The layers up to ``end`` as the first ``n`` positions of one prompt pass them; read at the last of these."""

    def __init__(
        self,
        adapter: Adapter,
        trace: Trace,
        prompt: int,
        n: int,
        end: int,
        dtype: torch.dtype,
        compute: torch.dtype,
    ) -> None:
        self.adapter, self.trace, self.n, self.end = adapter, trace, n, end
        self.dtype, self.compute = dtype, compute
        first = trace.span(prompt).start
        self.prompt, self.span = prompt, slice(first, first + n)
        self._layers: dict[int, Layer] = {}
        self._maps: dict[int, LayerMaps] = {}

    def layer(self, index: int) -> Layer:
        if index not in self._layers:
            self._layers[index] = self.adapter.layer(index)
        return self._layers[index]

    def queries(self, index: int) -> slice:
        """Where layer ``index`` is needed: everywhere, but in the last one only where it is read."""
        return slice(self.n - 1 if index == self.end - 1 else 0, self.n)

    def maps(self, index: int) -> LayerMaps:
        """The maps of a layer; kept where that costs little: no other copy of the weights, few probabilities."""
        if index in self._maps:
            return self._maps[index]
        layer = self.layer(index)
        maps = LayerMaps(layer, self.trace.layers[index], self.span, self.queries(index), self.dtype, self.compute)
        probabilities = self.end * layer.attention.n_heads * self.n**2
        if layer.mlp.w_down.dtype == self.compute and probabilities <= _KEPT:
            self._maps[index] = maps
        return maps

    def drive(self, index: int) -> tuple[Tensor, float]:
        """s · γ of a layer's MLP norm at all positions (N, D), and a gate's root mean square response to a unit vector.

        The product of that with a component's norm is how far its gates can be expected from zero.
        """
        mlp = self.layer(index).mlp
        resid = self.trace.layers[index].resid_mid[self.span].to(self.dtype)
        weight = mlp.norm.scale(resid).to(self.dtype)[:, None] * mlp.norm.weight.to(self.dtype)
        size = torch.linalg.vector_norm(mlp.w_gate, dtype=torch.float32) / mlp.w_gate.numel() ** 0.5
        return weight, float(size.detach())
