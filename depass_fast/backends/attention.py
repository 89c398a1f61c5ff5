"""Frozen attention for the torch backend: P recomputed from Q and K in tiles, applied to blocks of values."""

from __future__ import annotations

import torch
from torch import Tensor

from ..trace import AttentionTrace, causal_mask


class FrozenAttention:
    """One prompt's P with s[k] folded into its columns, in tiles of at most ``tile`` elements."""

    def __init__(
        self, q: Tensor, k: Tensor, trace: AttentionTrace, scale: Tensor, tile: int, dtype: torch.dtype
    ) -> None:
        self.q, self.k, self.scale = q, k, scale  # (N, H, d), (N, Hkv, d), (N,)
        self.trace, self.dtype = trace, dtype
        self.kv, self.groups = k.shape[1], q.shape[1] // k.shape[1]
        n = len(q)
        heads = max(1, min(self.kv, tile // (self.groups * n * n)))
        rows = n if self.groups * n * n <= tile else max(1, tile // (self.groups * n))
        self.tiles = [
            (slice(h, min(h + heads, self.kv)), slice(i, min(i + rows, n)))
            for h in range(0, self.kv, heads)
            for i in range(0, n, rows)
        ]
        self.only = self.probabilities(*self.tiles[0]) if len(self.tiles) == 1 else None

    def probabilities(self, heads: slice, queries: slice) -> Tensor:
        """P · s of a tile of KV heads and queries, keys up to the last query, made in ≥ float32: (h, G, Q, K)."""
        wide, n_keys = self.scale.dtype, queries.stop
        k = self.k[:n_keys, heads].to(wide).permute(1, 2, 0)  # (h, d, K)
        q = self.q[queries].to(wide).unflatten(1, (self.kv, self.groups))[:, heads]
        logits = (q.permute(1, 2, 0, 3).flatten(1, 2) @ k).mul_(self.trace.scale)  # (h, G·Q, K)
        if self.trace.softcap is not None:
            logits = torch.tanh(logits / self.trace.softcap).mul_(self.trace.softcap)
        logits = logits.unflatten(1, (self.groups, -1))
        seen = causal_mask(torch.arange(queries.start, queries.stop, device=q.device), n_keys, self.trace.window)
        return logits.masked_fill_(~seen, -torch.inf).softmax(-1).mul_(self.scale[:n_keys]).to(self.dtype)

    def mix(self, values: Tensor, start: int) -> Tensor:
        """P · s applied to the values (N', B, Hkv·d) of positions ``start`` and up -> (N'·B, H·d)."""
        n, b = values.shape[:2]
        values = values.view(n, b, self.kv, -1)
        out = values.new_empty(n, b, self.kv, self.groups, values.shape[-1])
        for heads, queries in self.tiles:
            if queries.stop <= start:
                continue
            first = max(queries.start, start)
            p = self.probabilities(heads, slice(first, queries.stop)) if self.only is None else self.only[:, :, first:]
            p = p[..., start:].flatten(1, 2)  # (h, G·Q, K)
            v = values[: p.shape[-1], :, heads].permute(2, 0, 1, 3).flatten(2)  # (h, K, B·d)
            y = torch.bmm(p, v).unflatten(1, (self.groups, -1)).unflatten(-1, (b, -1))  # (h, G, Q, B, d)
            out[first - start : queries.stop - start, :, heads] = y.permute(2, 3, 0, 1, 4)
        return out.view(n * b, -1)
