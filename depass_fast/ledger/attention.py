"""The way back through a layer's frozen attention: the transpose of V, P and O, for packed prompts.

P is made again from Q and K, a tile of it at a time: N² probabilities are held nowhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..adapters import Attention
from ..runtime.products import product
from ..trace.record import AttentionTrace
from ..trace.selection import seen_by_heads
from .batches import Batch, Packing
from .mixing import sources_of_recurrence, through_recurrence
from .norms import FrozenNorm

_CPU_TILE, _GPU_TILE = 1 << 22, 1 << 26  # probabilities that are held at once


@dataclass(frozen=True)
class AttentionBack:
    """The gradients (R, T, D) that attention passes to what it reads, and the scores of what it adds.

    ``heads`` (R, P, H) are those of its heads, None if they were not asked for; ``constant`` (R, P) that of its
    constants, None where it has none.
    """

    gradients: Tensor
    heads: Tensor | None
    constant: Tensor | None


class Tile(NamedTuple):
    """Some prompts of a batch, KV heads, queries and the keys that these may see; ``groups`` heads share a KV head."""

    prompts: slice
    kv: slice
    queries: slice
    keys: slice
    groups: int

    @property
    def heads(self) -> slice:
        return slice(self.kv.start * self.groups, self.kv.stop * self.groups)


@dataclass(frozen=True)
class WayThroughAttention:
    """One layer's attention; with ``partial``, gradients arrive at the read positions alone.

    Products run in ``compute``, the rest in the dtype of the gradients.
    """

    weights: Attention
    trace: AttentionTrace
    packing: Packing
    partial: bool
    compute: torch.dtype

    def back(self, gradients: Tensor, x: Tensor, with_heads: bool) -> AttentionBack:
        """Take gradients (R, A, D) of what attention adds back to what it reads, the residual stream ``x`` (T, D)."""
        y, norm = self.of_heads(gradients), FrozenNorm.of(self.weights.norm, x, gradients.dtype)
        values = self.values(norm.read(x), gradients.dtype) if with_heads else None
        of_values, heads = self.through_heads(y, values)
        constant = self._mixed_constant(gradients, y) if self.trace.is_mixed else self._constant(gradients, of_values)
        return AttentionBack(norm.back(self.of_read(of_values, gradients.dtype)), heads, constant)

    def of_heads(self, gradients: Tensor) -> Tensor:
        """Take gradients (R, A, D) of what attention adds back to what its output projection reads: (R, A, H·d)."""
        written = self.weights.written_transposed(gradients, self._out_scale(gradients))
        return product(written.to(self.compute), self.weights.w_o.to(self.compute))

    def through_heads(self, y: Tensor, values: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Take gradients (R, A, H·d) of what the output projection reads back to the values (R, T, Hkv·d).

        The second are the heads' scores (R, P, H), given the values (T, Hkv, d) without their constants.
        """
        if self.trace.is_mixed:
            return through_recurrence(self.weights, self.trace, self.packing, self.partial, y, values)
        of_values, heads = self._through_probabilities(self._gated(y), values)
        return self._scaled(of_values), heads

    def of_read(self, of_values: Tensor, dtype: torch.dtype) -> Tensor:
        """Take gradients (R, T, Hkv·d) of values back to what their projection reads, behind the norm: (R, T, D)."""
        if self.trace.latent_scale is not None:
            of_values = of_values * self.trace.latent_scale[:, None]
        return product(of_values.to(self.compute), self.weights.w_v.to(self.compute)).to(dtype)

    def _out_scale(self, like: Tensor) -> Tensor | None:
        """The scale of the norm on attention's output where gradients arrive, on their device; None without one."""
        scale = self.trace.out_scale
        if scale is None:
            return None
        at = self.packing.at(self.partial, like.device)
        return scale if at is None else scale[at]

    def _gated(self, y: Tensor) -> Tensor:
        """Take gradients (R, A, H·d) of what the output projection reads back to what P gives."""
        ratio = self.trace.out_ratio
        if ratio is None:
            return y
        at = self.packing.at(self.partial, y.device)
        return y * (ratio if at is None else ratio[at]).to(y)

    def sources(self, gradients: Tensor, x: Tensor) -> Tensor:
        """Return the scores of the heads (R, T, H) by the position whose values they carry; arguments as of `back`."""
        y, dtype = self.of_heads(gradients), gradients.dtype
        values = self.values(FrozenNorm.of(self.weights.norm, x, dtype).read(x), dtype)
        if self.trace.is_mixed:
            return sources_of_recurrence(self.weights, self.trace, self.packing, self.partial, y, values)
        y, found = self._gated(y), values.new_empty(len(y), self.packing.n_positions, self.weights.n_heads)
        for batch in self.packing.batches(self.partial, y.device):
            z = self._of_batch(batch, batch.gradients(y)).unflatten(1, (self.weights.n_kv_heads, -1))
            given = batch.take(values).permute(0, 2, 1, 3)[:, :, None, :, None]  # (B, Hkv, 1, N, 1, d)
            scores = (z.to(values) * given).sum(5)  # (B, Hkv, G, N, R)
            batch.put(found, scores.permute(4, 0, 3, 1, 2).flatten(3))
        return found

    def _through_probabilities(self, y: Tensor, values: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Take gradients (R, A, H·d) of the heads back to the values (R, T, Hkv·d).

        The second are the heads' scores (R, P, H), given the values (T, Hkv, d) without their constants.
        """
        kv, d = self.weights.n_kv_heads, self.weights.head_dim
        read = y.new_empty(len(y), self.packing.n_positions, kv * d)
        found = None if values is None else values.new_empty(len(y), self.packing.n_prompts, self.weights.n_heads)
        for batch in self.packing.batches(self.partial, y.device):
            z = self._of_batch(batch, batch.gradients(y)).unflatten(1, (kv, -1))  # (B, Hkv, G, N, R, d)
            if found is not None and values is not None:
                given = batch.take(values).permute(0, 2, 1, 3)[:, :, None, :, None]  # (B, Hkv, 1, N, 1, d)
                scores = (z.to(values) * given).sum((3, 5))
                found[:, batch.prompts] = scores.permute(3, 0, 1, 2).flatten(2)
            of_values = z[:, :, 0] if z.shape[2] == 1 else z.sum(2)  # (B, Hkv, N, R, d)
            batch.put(read, of_values.permute(3, 0, 2, 1, 4).flatten(3))
        return read, found

    def _of_batch(self, batch: Batch, y: Tensor) -> Tensor:
        """Apply the transpose of P to one batch's gradients (R, B, Q, H·d) of heads: (B, H, N, R, d)."""
        rows, heads, (b, n) = len(y), self.weights.n_heads, batch.keys.shape
        y = y.unflatten(-1, (heads, -1)).permute(1, 3, 2, 0, 4).flatten(3)  # (B, H, Q, R·d)
        keys, queries = batch.take(self.trace.k), batch.at_queries(self.trace.q)
        most = _CPU_TILE if y.device.type == "cpu" else _GPU_TILE
        kv = self.weights.n_kv_heads
        tiles = list(_tiles(batch, kv, heads // kv, self.trace.window, most))
        out = None if len(tiles) == 1 else y.new_zeros(b, heads, n, y.shape[3])
        for tile in tiles:
            p = self._probabilities(batch, tile, queries, keys).to(y.dtype)
            part = p.transpose(2, 3) @ y[tile.prompts, tile.heads, tile.queries]
            if out is None:
                return part.unflatten(3, (rows, -1))
            out[tile.prompts, tile.heads, tile.keys] += part
            del p, part  # before the next tile is made
        assert out is not None
        return out.unflatten(3, (rows, -1))

    def _probabilities(self, batch: Batch, tile: Tile, q: Tensor, k: Tensor) -> Tensor:
        """Return P of a tile, given q (B, Q, H, d) and k (B, N, Hkv, d): (b, h, Q', K), in float32 or wider."""
        trace = self.trace
        wide = torch.promote_types(torch.promote_types(q.dtype, torch.float32), self.compute)
        q = q[tile.prompts, tile.queries, tile.heads].to(wide)
        q = q.unflatten(2, (-1, tile.groups)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # (b, hkv, G·Q', d)
        k = k[tile.prompts, tile.keys, tile.kv].to(wide).permute(0, 2, 3, 1)  # (b, hkv, d, K)
        kind = trace.window, trace.chunked
        mask = batch.mask(tile.prompts, tile.queries, tile.keys, *kind, wide)[:, None, None]  # (b, 1, 1, Q', K)
        mask = mask.expand(-1, k.shape[1], tile.groups, -1, -1).expand(len(k), -1, -1, -1, -1).flatten(2, 3)
        if trace.softcap is None:
            logits = torch.baddbmm(mask.flatten(0, 1), q.flatten(0, 1), k.flatten(0, 1), alpha=trace.scale)
        else:
            logits = torch.tanh((q @ k).mul_(trace.scale / trace.softcap)).mul_(trace.softcap).add_(mask).flatten(0, 1)
        logits = logits.view(len(k), -1, *mask.shape[2:]).unflatten(2, (tile.groups, -1)).flatten(1, 2)  # (b, h, Q', K)
        if trace.key_bias is not None:
            bias = batch.take(trace.key_bias)[tile.prompts, tile.keys, tile.heads]
            logits = logits + bias.to(wide).permute(0, 2, 1)[:, :, None]
        if trace.chosen_keys is not None:
            chosen = batch.at_queries(trace.chosen_keys)[tile.prompts, tile.queries]
            seen = seen_by_heads(chosen, tile.keys.stop, trace.key_block, trace.q.shape[1])[..., tile.keys]
            seen = seen if seen.shape[1] == 1 else seen[:, tile.heads]
            logits = logits.masked_fill(~seen, -torch.inf)
        p = logits.softmax(-1)
        if trace.row_sum is not None:
            row_sum = batch.at_queries(trace.row_sum)[tile.prompts, tile.queries, tile.heads]
            p *= row_sum.to(wide).permute(0, 2, 1)[..., None]
        return p

    def values(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the values that every KV head makes of ``x`` (T, D), without their constant part: (T, Hkv, d)."""
        weights, trace = self.weights, self.trace
        values = product(x.to(self.compute), weights.w_v.to(self.compute).T).to(dtype)
        if trace.latent_scale is not None:
            values = values * trace.latent_scale.to(dtype)[:, None]
        return self._scaled(values).unflatten(-1, (weights.n_kv_heads, -1))

    def _scaled(self, values: Tensor) -> Tensor:
        """Return values, or gradients of them, (..., T, Hkv·d), as a clamp or a norm of heads' values scaled them."""
        ratio, scales = self.trace.value_ratio, self.trace.head_scales
        if scales is not None:
            by_head = values.unflatten(-1, (self.weights.n_kv_heads, -1))
            values = (by_head * scales[..., None].to(values)).flatten(-2)
        return values if ratio is None or self.trace.is_mixed else values * ratio.to(values.device)

    def _mixed_constant(self, gradients: Tensor, y: Tensor) -> Tensor | None:
        """Return the score (R, P) of a recurrence's constants, given the gradients ``y`` (R, A, H·d) of its heads."""
        weights, heads, dtype = self.weights, self.trace.constant_heads, gradients.dtype
        at = self.packing.at(self.partial, y.device)
        written, parts = weights.written_constant(weights.o.bias, self._out_scale(gradients), dtype), []
        if heads is not None and weights.has_bias:
            given = (heads if at is None else heads[at]).to(dtype)
            parts.append(self.packing.sum((y.to(dtype) * given).sum(-1), self.partial))
        if written is not None:
            parts.append(self.packing.sum((gradients * written).sum(-1), self.partial))
        return sum(parts[1:], parts[0]) if parts else None

    def _constant(self, gradients: Tensor, of_values: Tensor) -> Tensor | None:
        """Return the score (R, P) of attention's constants, given the gradients (R, T, Hkv·d) of its values."""
        weights, dtype = self.weights, gradients.dtype
        value = weights.value_constant(dtype)
        written = weights.written_constant(weights.o.bias, self._out_scale(gradients), dtype)
        parts = []
        if value is not None:
            parts.append(self.packing.sum(of_values.to(dtype) @ value, False))
        if written is not None:
            parts.append(self.packing.sum((gradients * written).sum(-1), self.partial))
        return sum(parts[1:], parts[0]) if parts else None


def _tiles(batch: Batch, kv: int, groups: int, window: int | None, most: int) -> Iterator[Tile]:
    """Cut a batch's prompts, KV heads and queries into tiles of at most ``most`` probabilities, or of one query."""
    (b, n), q = batch.keys.shape, batch.slots.shape[1]
    one = groups * q * n  # probabilities of a KV head of one prompt
    queries = q if one <= most else max(1, most // (groups * n))
    heads = min(kv, max(1, most // one))
    prompts = min(b, max(1, most // (one * kv)))
    in_order = batch.causal and batch.padded is None
    for first in range(0, b, prompts):
        for head in range(0, kv, heads):
            for begin in range(0, q, queries):
                end = min(begin + queries, q)
                seen = slice(0, n)
                if in_order:
                    seen = slice(0 if window is None else max(0, begin - window + 1), end)
                some = slice(first, min(first + prompts, b))
                yield Tile(some, slice(head, min(head + heads, kv)), slice(begin, end), seen, groups)
