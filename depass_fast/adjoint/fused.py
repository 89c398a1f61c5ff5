"""The sweep's arithmetic of one layer by Triton's kernels: the same as :mod:`.maps` and :mod:`.crowd`, in few launches.

Rows stay in float32; what a product reads and writes stays in the products' dtype, and a product adds to the rows by
itself. It is chosen in one place, :meth:`.stack.LayerStack.maps`, and the plain code is its oracle.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..adapters import Branch, Norm
from ..kernels.common import FLOATS, current
from ..kernels.crowd import CrowdTables, StartRows, gradients_of_gates, share_with_crowds
from ..kernels.few import apply_few, fits
from ..kernels.loudness import loudest
from ..kernels.rows import Rows, add_norm_back, read_rows, row_scales
from ..runtime.products import accumulate
from .maps import LayerMaps
from .memory import positions_at_once


class FusedMaps(LayerMaps):
    """The maps of a layer, with kernels around the products; rows are float32. :class:`.maps.LayerMaps` says the rest.

    On the way back gradients are float32, with a copy in the products' dtype that the step before has written.
    """

    fused = True

    @staticmethod
    def scales(module: Branch, resid: Tensor, dtype: torch.dtype) -> Tensor:
        norm = module.norm
        if norm is None or norm.is_factor:
            return LayerMaps.scales(module, resid, dtype)
        with current(resid.device):
            return row_scales(resid.contiguous(), None, norm.eps, norm.centred)

    def _norm(self, norm: Norm | None) -> Norm | None:
        has_kernel = norm is None or norm.weight is None or norm.weight.dtype in FLOATS
        return norm if has_kernel else super()._norm(norm)  # kernels widen what they read

    def _recorded(self, x: Tensor) -> Tensor:
        x = x if x.dtype in FLOATS else super()._recorded(x)
        return x if x.stride(-1) == 1 else x.contiguous()

    def add_attention(self, x: Tensor) -> Tensor:
        heads = self._mixed(self._read(x, self._attention_norm, _ones(self.queries.stop, x.device)) @ self._w_v.T)
        return self._added(x[:, self.queries], heads, self._w_o)

    def _through_p(self, values: Tensor) -> Tensor:
        p = self._only
        if p is None or not fits(p.shape[2], p.shape[3], values.shape[2] // self._kv):
            return super()._through_p(values)
        with current(values.device):
            return apply_few(p, values)

    def _through_p_transposed(self, y: Tensor) -> Tensor:
        p = self._only
        if p is None or not fits(p.shape[2], p.shape[3], y.shape[2] // (self._kv * self._groups)):
            return super()._through_p_transposed(y)
        with current(y.device):
            return apply_few(p, y, transposed=True)

    def values_read(self, y: Tensor) -> Tensor:
        """Return gradients (R, N, D) behind the norm before attention, from those of what it adds, (R, Q, D).

        Both are in the products' dtype. :meth:`add_attention_back` takes them through the norm.
        """
        return self._values_transposed(y @ self._w_o) @ self._w_v

    def allocate(
        self, x: Tensor, read: Tensor, rows: StartRows, counts: Tensor, temperature: float, budget: int
    ) -> tuple[Tensor, CrowdTables]:
        """Return rows ``x`` (R, Q, D) with their shares added to them, and what the layer does to the crowds.

        ``read`` (R, Q, D) is what the MLP reads, ``counts`` (S, Q or 1, 1) are the crowds' components;
        ``budget`` bounds the gates held at once, in bytes.
        """
        queries, width = self.act.shape
        tables = CrowdTables(
            *(x.new_empty(len(rows), queries, width) for _ in range(3)), slope=x.new_empty(len(rows), queries)
        )
        alive = torch.empty(read.shape[:2], dtype=torch.uint8, device=x.device)
        half = self._read(read, self._mlp_norm, self.mlp_scale[:, 0], alive)
        counts = counts[..., 0].expand(-1, queries)
        size = positions_at_once(budget, len(x), width, self.compute.itemsize, held=2)
        for first in range(0, queries, size):
            at = slice(first, min(first + size, queries))
            g = half[:, at] @ self._w_gate.T
            part = CrowdTables(*(getattr(tables, name)[:, at] for name in ("log_z", "share", "mean", "slope")))
            given = self.act[at], self.gate_total[at], temperature, part, self.gate_constant
            with current(x.device):
                share_with_crowds(g, rows, alive[:, at], counts[:, at], *given)
            if size >= queries:
                x = self._added(x, g, self._w_down)
            else:
                x[:, at].add_(g @ self._w_down.T)
        return x, tables

    def gates_read(self, y: Tensor, temperature: float, tables: Sequence[Tensor], offsets: Tensor) -> Tensor:
        """Return gradients (S, K, Q, D) behind the norm before the MLP, from those of what it adds.

        Both are in the products' dtype. ``tables`` are a crowd's ``log_z``, ``share``, ``mean`` and ``slope``; to
        ``offsets`` (S, K, Q) is added what a component receives where its gates are zero. :meth:`add_mlp_back` takes
        the gradients through the norm.
        """
        y = y @ self._w_down  # (S, K, Q, I)
        log_z, share, mean, slope = tables
        with current(y.device):
            gradients_of_gates(y, self.act, temperature, CrowdTables(log_z, share, mean, slope[..., 0]), offsets)
        return y @ self._w_gate

    def add_attention_back(self, back: Tensor, y: Tensor) -> Tensor:
        """Add to gradients (S, K, N, D), in place, those behind the norm before attention, (S·K, N, D).

        Returned are the sums in the products' dtype.
        """
        return self._add_back(back, y, self._attention_norm, None)

    def add_mlp_back(self, back: Tensor, y: Tensor) -> Tensor:
        """Do the same with those behind the norm before the MLP, at the queries."""
        return self._add_back(back, y, self._mlp_norm, self.mlp_scale[:, 0])

    def _add_back(self, back: Tensor, y: Tensor, norm: Norm | None, scale: Tensor | None) -> Tensor:
        weight, centred = (None, False) if norm is None else (norm.weight, norm.centred)
        narrow = None if self.compute == back.dtype else torch.empty_like(back, dtype=self.compute)
        flat, copy = back.view(-1, back.shape[-1]), None if narrow is None else narrow.view(-1, back.shape[-1])
        with current(back.device):
            add_norm_back(flat, y.view(flat.shape), scale, weight, centred, copy)
        return back if narrow is None else narrow

    def _unscaled(self, x: Tensor) -> Tensor:
        return self._read(x[:, None], self._mlp_norm, _ones(1, x.device))[:, 0]

    def _largest(self, gates: Tensor, amounts: Tensor, out: Tensor) -> None:
        with current(gates.device):
            loudest(gates, amounts, self.mlp_scale[:, 0], out)

    def _read(self, x: Tensor, norm: Norm | None, scale: Tensor, alive: Tensor | None = None) -> Tensor:
        """Return rows (R, Q, D) through a norm, in the products' dtype; ``alive`` receives which are not all zero."""
        flat = x.reshape(-1, x.shape[2])
        segment = _positions(1 << (len(x) - 1).bit_length(), len(scale), x.device)[: len(flat)]
        weight, centred = (None, False) if norm is None else (norm.weight, norm.centred)
        where = Rows(segment, torch.empty(len(scale) + 1, dtype=torch.int64, device=x.device))
        out = torch.empty_like(flat, dtype=self.compute)
        with current(x.device):
            read_rows(flat, where, scale, weight, centred, out, None if alive is None else alive.view(-1))
        return out.view(x.shape)

    def _added(self, x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
        """Return x (R, Q, D) + y (R, Q, C) @ weight.T; x is used up."""
        x = x.contiguous()
        accumulate(x.view(-1, x.shape[2]), y.view(-1, y.shape[2]), weight.T)
        return x


@lru_cache(maxsize=16)
def _ones(positions: int, device: torch.device) -> Tensor:
    return torch.ones(positions, dtype=torch.float32, device=device)


@lru_cache(maxsize=16)
def _positions(components: int, positions: int, device: torch.device) -> Tensor:
    """Return the position of every row of so many components at all positions: int32."""
    return torch.arange(positions, dtype=torch.int32, device=device).repeat(components)
