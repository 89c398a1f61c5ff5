"""Frozen attention for the torch backend: P recomputed from Q and K in tiles, applied to blocks of values."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from ...adapters import Attention
from ...labels import BIAS
from ...runtime.transfer import to_device
from ...state.layout import Layout
from ...trace.attention import seen_keys, span_probabilities
from ...trace.record import AttentionTrace
from .blocks import Block, gather
from .workspace import Workspace

_FEW = 1 << 20  # numbers of a mask that all layers share


class FrozenAttention:
    """One prompt's P with s[k] folded into its columns, in tiles of at most ``tile`` elements.

    ``keys`` are the prompt's packed positions, ``scale`` (T,) is s of all, (T, Hkv) where it differs between KV heads.
    A scale of the output is in P's rows.
    """

    def __init__(self, trace: AttentionTrace, keys: slice, scale: Tensor, tile: int, dtype: torch.dtype) -> None:
        q, k = trace.q[keys], trace.k[keys]
        self.q, self.k, self.scale = q, k, scale[keys]  # (N, H, d), (N, Hkv, d), (N,)
        self.key_bias = None if trace.key_bias is None else trace.key_bias[keys]  # (N, H)
        self.row_sum = None if trace.row_sum is None else trace.row_sum[keys]  # (N, H)
        self.out_scale = None if trace.out_scale is None else trace.out_scale[keys]  # (N,)
        self.out_ratio = None if trace.out_ratio is None else trace.out_ratio[keys]  # (N, H·d)
        self.trace, self.span, self.dtype = trace, keys, dtype
        self.kv, self.groups = k.shape[1], q.shape[1] // k.shape[1]
        n = len(q)
        heads = max(1, min(self.kv, tile // (self.groups * n * n)))
        rows = n if self.groups * n * n <= tile else max(1, tile // (self.groups * n))
        self.tiles = [
            (slice(h, min(h + heads, self.kv)), slice(i, min(i + rows, n)))
            for h in range(0, self.kv, heads)
            for i in range(0, n, rows)
        ]

    @cached_property
    def only(self) -> Tensor | None:
        """All of P · s if one tile holds it, else None."""
        return self.probabilities(*self.tiles[0]) if len(self.tiles) == 1 else None

    def walk(self, start: int) -> Iterator[tuple[slice, int, int, Tensor]]:
        """Yield tiles of the queries from ``start`` on: KV heads, first and last (excluded) query, and their P · s."""
        for heads, queries in self.tiles:
            if queries.stop > start:
                first = max(queries.start, start)
                whole = self.only
                p = self.probabilities(heads, slice(first, queries.stop)) if whole is None else whole[:, :, first:]
                yield heads, first, queries.stop, p

    def probabilities(self, heads: slice, queries: slice) -> Tensor:
        """Return P · s of a tile of KV heads and queries, keys up to the last query: (h, G, Q, K).

        It is made in float32 or wider.
        """
        wide, n_keys = self.scale.dtype, queries.stop
        p = self._few(queries) if n_keys == len(self.q) and heads == slice(0, self.kv) else None
        if p is None:
            p = self._tile(heads, queries)
        if self.out_scale is not None:
            p *= self.out_scale[queries, None].to(wide)
        out = p if p.dtype == self.dtype else torch.empty_like(p, dtype=self.dtype)
        return torch.mul(p, self._columns(n_keys, heads), out=out)

    def _few(self, queries: slice) -> Tensor | None:
        """Return P of all heads for few ``queries`` and all keys, in few operations: (Hkv, G, Q, N); else None."""
        n = len(self.q)
        if (queries.stop - queries.start) * n * self.groups > _FEW or self.trace.minus is not None:
            return None
        return span_probabilities(self.trace, self.span, queries, self.scale.dtype).unflatten(0, (self.kv, -1))

    def _tile(self, heads: slice, queries: slice) -> Tensor:
        """Return P of a tile, without s: (h, G, Q, K)."""
        wide, n_keys = self.scale.dtype, queries.stop
        k = self.k[:n_keys, heads].to(wide).permute(1, 2, 0)  # (h, d, K)
        q = self.q[queries].to(wide).unflatten(1, (self.kv, self.groups))[:, heads]
        logits = (q.permute(1, 2, 0, 3).flatten(1, 2) @ k).mul_(self.trace.scale)  # (h, G·Q, K)
        if self.trace.softcap is not None:
            logits = torch.tanh(logits / self.trace.softcap).mul_(self.trace.softcap)
        logits = logits.unflatten(1, (self.groups, -1))
        if self.key_bias is not None:
            logits += self._by_head(self.key_bias[:n_keys], heads).permute(1, 2, 0)[:, :, None]
        here = torch.arange(queries.start, queries.stop, device=q.device)
        seen = seen_keys(self.trace, self.span, here, n_keys)
        seen = seen if seen.ndim == 2 else seen[heads]
        p = logits.masked_fill_(~seen, -torch.inf).softmax(-1)
        if self.row_sum is not None:
            p *= self._by_head(self.row_sum[queries], heads).permute(1, 2, 0)[..., None]
        return p

    def _columns(self, n_keys: int, heads: slice) -> Tensor:
        """s of the first keys, (K,) or (h, 1, 1, K)."""
        scale = self.scale[:n_keys]
        return scale if scale.ndim == 1 else scale[:, heads].T[:, None, None]

    def _by_head(self, x: Tensor, heads: slice) -> Tensor:
        """The columns (N, H) of some KV heads as (N, h, G), in the dtype that P is made in."""
        return x.to(self.scale.dtype).unflatten(1, (self.kv, self.groups))[:, heads]

    def mix(self, values: Tensor, block: Block, workspace: Workspace) -> Tensor:
        """Apply P · s to a block's values (r, Hkv·d) -> (r, H·d), at the same rows. ``values`` is used up."""
        n, b, start = block.n_positions, block.n_components, block.start
        columns = values.view(len(values), self.kv, -1).transpose(0, 1)  # (Hkv, r, d)
        keys = workspace.take("keys", (self.kv, n * b, columns.shape[2]), values)
        if block.slots is None:
            keys.copy_(columns)
        else:
            keys.zero_().index_copy_(1, block.slots, columns)
        keys = keys.view(self.kv, n, -1)  # (Hkv, N', B·d)
        mixed = workspace.take("mixed", (n, b, self.kv, self.groups, columns.shape[2]), values)
        for heads, first, last, p in self.walk(start):
            p = p[..., start:].flatten(1, 2)  # (h, G·Q, K)
            y = workspace.take("values", (*p.shape[:2], keys.shape[2]), values)
            torch.bmm(p, keys[heads, : p.shape[2]], out=y)
            y = y.view(len(p), self.groups, -1, b, columns.shape[2])  # (h, G, Q, B, d)
            mixed[first - start : last - start, :, heads] = y.permute(2, 3, 0, 1, 4)
        if self.out_ratio is not None:
            mixed *= self.out_ratio[start:, None].to(mixed).view(n, 1, self.kv, self.groups, -1)
        return gather(mixed.view(n, b, -1), block)

    def spread(self, writes: Tensor, coefficients: Tensor | None, start: int) -> Tensor:
        """Apply P · s to components that are products: (H, B, D) -> (B, N - start, D).

        ``writes`` are the components' vectors after V and O of every head, ``coefficients`` (N, B) their factors at
        each position. None stands for a factor of one at position ``start`` + b for component b, zero elsewhere. The
        sum over keys is taken on single numbers, and only a sum over the heads is left for the vectors.
        """
        b = writes.shape[1]
        writes = writes.unflatten(0, (self.kv, self.groups))
        out = writes.new_zeros(b, len(self.q) - start, writes.shape[-1])
        for heads, first, last, p in self.walk(start):
            p = p.flatten(0, 1)  # (h·G, Q, K)
            seen = p[..., start : start + b] if coefficients is None else p @ coefficients[: p.shape[2]]  # (h·G, Q, B)
            alive, at = seen.shape[2], slice(first - start, last - start)
            out[:alive, at].baddbmm_(seen.permute(2, 1, 0), writes[heads, :, :alive].flatten(0, 1).transpose(0, 1))
        return out


def clamp_values(
    values: Tensor, layout: Layout, block: Block, weights: Attention, trace: AttentionTrace, scale: Tensor
) -> None:
    """Clamp values (r, Hkv·d) of a block as the family clamps their sum: each element by the frozen ratio.

    The constant part of a value goes to `bias` before that. ``values`` lack s, which is in P's columns.
    """
    assert trace.value_ratio is not None
    rows = torch.arange(layout.n_rows, device=values.device)[block.rows]
    segment = to_device(layout.row_segments(), values.device)[rows]
    packed = layout.tensor("packed", values.device)[segment]
    constant, bias = weights.value_constant(values.dtype), layout.index(BIAS)
    if constant is not None and bias is not None:
        first = layout.tensor("starts", values.device)[segment]
        values += torch.where((rows - first == bias)[:, None], constant / scale[packed, None].to(constant), 0.0)
    values *= trace.value_ratio[packed].to(values.dtype)
