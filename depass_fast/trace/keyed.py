"""Keys that are values, frozen: what stands between the projection of values and the output projection.

Values are scaled as keys are, by position and channel, and turned by the rotary embedding at their position. Entries
are sums of the values of a window of positions, turned at its first one. The probabilities mix both, and what a head
gives is turned back at the query's position (DESIGN.md section 10). All of it is linear in the values, and causal.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..adapters import Attention
from .attention import causal_mask
from .mixing import FrozenMixing
from .record import AttentionTrace
from .selection import selected

_HELD = 1 << 26  # probabilities that are kept from one call to the next
_QUERIES = 512  # whose probabilities are made at once

# queries, the positions and the entries that they may see, and their probabilities (H, Q, K) for both, one behind the
# other
Tile = tuple[slice, slice, slice, Tensor]


class FrozenKeyed:
    """The attention of one layer on one prompt, at the packed positions ``span``. It computes in ``dtype``.

    Values (N, B, C) have passed their projections and the norm in front. The first d of C channels are those of
    positions, the others those of entries. Values that lack the norm's scale are multiplied by ``scale`` (N,) on the
    way forward.
    """

    def __init__(
        self, weights: Attention, trace: AttentionTrace, span: slice, dtype: torch.dtype, scale: Tensor | None = None
    ) -> None:
        assert trace.keyed is not None
        self._scale = scale
        self._trace, self._span, self._frozen = trace, span, trace.keyed
        self.heads, self.positions, self._width = weights.n_heads, span.stop - span.start, weights.head_dim
        self._dtype, self._wide = dtype, torch.promote_types(dtype, torch.float32)
        self._rate = self._frozen.rate or 1
        self.entries = 0 if self._frozen.rate is None else self.positions // self._rate
        self._kept: dict[int, Tile] = {}

    def forward(self, values: Tensor, start: int = 0) -> Tensor:
        """Return what heads give for values (N - start, B, C) of positions from ``start`` on: (N - start, B, H·d)."""
        factors = self._ratio(start)
        factors = factors if self._scale is None else factors * self._scale[start:, None].to(factors)
        keys, first = self._keys(values * factors[:, None].to(values), start)
        out = values.new_empty(len(values), values.shape[1], self.heads, self._width)
        for queries, positions, entries, p in self._tiles(start):
            seen, later = positions.stop - positions.start, max(0, entries.stop - first)
            x = torch.cat([keys[positions.start - start :][:seen], keys[len(values) :][:later]])
            p = p if first == 0 else torch.cat([p[..., :seen], p[..., seen + first :]], -1)
            mixed = (p.flatten(0, 1) @ x.flatten(1)).view(*p.shape[:2], *x.shape[1:])  # (H, Q, B, d)
            turn(mixed, *self._angles(queries), back=True)
            out[queries.start - start : queries.stop - start] = mixed.permute(1, 2, 0, 3)
        return out.flatten(2)

    def back(self, gradients: Tensor, values: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return the gradients (N, B, C) of values, given those of what the heads give (N, B, H·d).

        The second are the scores (N, B, H) of what heads take from every position, given its ``values`` (N, C).
        """
        y = gradients.unflatten(2, (self.heads, -1)).permute(2, 0, 1, 3).contiguous()  # (H, N, B, d)
        turn(y, *self._angles(slice(0, self.positions)))
        if values is None:
            return self._read(y, slice(0, self.heads)), None
        found = y.new_empty(*gradients.shape[:2], self.heads)
        total = y.new_zeros(*gradients.shape[:2], values.shape[-1])
        for head in range(self.heads):
            one = self._read(y, slice(head, head + 1))
            found[..., head] = (one * values[:, None].to(one)).sum(2)
            total += one
        return total, found

    def _read(self, y: Tensor, heads: slice) -> Tensor:
        """Take gradients (H, N, B, d) of what some heads mix back to the values (N, B, C)."""
        n, b = y.shape[1:3]
        of_keys = y.new_zeros(n + self.entries, b, self._width)
        for queries, positions, entries, p in self._tiles(0):
            part = p[heads].flatten(0, 1).T @ y[heads, queries].flatten(0, 1).flatten(1)
            part, seen = part.unflatten(1, (b, -1)), positions.stop - positions.start
            of_keys[positions] += part[:seen]
            of_keys[n : n + entries.stop] += part[seen:]
        own, of_entries = turn(of_keys[:n], *self._angles(slice(0, n)), back=True), of_keys[n:]
        parts = [own]
        if self._frozen.rate is not None:
            turn(of_entries, *self._angles_of_entries(0), back=True)
            halves = [of_entries]
            if self._frozen.overlaps:
                halves.insert(0, torch.cat([of_entries[1:], torch.zeros_like(of_entries[:1])])[: self.entries])
            for half in halves:
                spread = own.new_zeros(own.shape)
                spread[: self.entries * self._rate] = half.repeat_interleave(self._rate, 0)
                parts.append(spread)
        return torch.cat(parts, 2) * self._ratio(0)[:, None].to(own)

    def _keys(self, x: Tensor, start: int) -> tuple[Tensor, int]:
        """Return keys (N' + E', B, d) made of scaled values (N', B, C) from position ``start`` on, turned.

        E' are the entries from the second number on: earlier ones are zero.
        """
        d, rate, first = self._width, self._rate, min(start // self._rate, self.entries)
        own, rest = x[..., :d].contiguous(), x[..., d:]
        turn(own, *self._angles(slice(start, self.positions)))
        if self._frozen.rate is None or first == self.entries:
            return own, self.entries
        before = start - first * rate
        windows = rest.new_zeros((self.entries - first) * rate, *rest.shape[1:])
        windows[before:] = rest[: len(windows) - before]
        sums = windows.unflatten(0, (-1, rate)).sum(1)  # (E', B, d) or (E', B, 2·d)
        made = sums[..., -d:].contiguous()
        if self._frozen.overlaps:
            made[1:] += sums[:-1, :, :d]
        return torch.cat([own, turn(made, *self._angles_of_entries(first))]), first

    def _tiles(self, start: int) -> Iterator[Tile]:
        """Yield the queries from ``start`` on, some at a time, with probabilities for what is made of values there."""
        n = self.positions
        held = self.heads * n * (min(n, _QUERIES + (self._trace.window or n)) + self.entries)
        for begin in range(start // _QUERIES * _QUERIES, n, _QUERIES):
            tile = self._kept.get(begin)
            if tile is None:
                tile = self._tile(slice(begin, min(begin + _QUERIES, n)))
                if held <= _HELD:
                    self._kept[begin] = tile
            yield tile if start == 0 else _from(tile, start)

    def _tile(self, queries: slice) -> Tile:
        trace, frozen, wide = self._trace, self._frozen, self._wide
        positions = slice(trace.first_seen(queries.start), queries.stop)
        entries = slice(0, min(self.entries, queries.stop // self._rate))
        at = torch.arange(queries.start, queries.stop, device=trace.q.device)
        k = trace.k[self._span][positions, 0].to(wide)
        seen = causal_mask(at, queries.stop, trace.window, trace.chunked)[:, positions]
        if entries.stop:
            assert frozen.entries is not None
            made = frozen.entries[self._span][self._rate - 1 :: self._rate][entries].to(wide)
            closed = torch.arange(entries.stop, device=at.device) < ((at + 1) // self._rate)[:, None]
            if trace.chosen_keys is not None:
                closed &= selected(trace.chosen_keys[self._span][queries], entries.stop)
            k, seen = torch.cat([k, made]), torch.cat([seen, closed], 1)
        q = trace.q[self._span][queries].to(wide).transpose(0, 1)  # (H, Q, d)
        logits = (q @ k.T * trace.scale).masked_fill_(~seen, -torch.inf)
        if frozen.sinks is None:
            return queries, positions, entries, logits.softmax(-1).to(self._dtype)
        nothing = frozen.sinks.to(wide)[:, None, None].expand(-1, logits.shape[1], 1)
        p = torch.cat([logits, nothing], -1).softmax(-1)[..., :-1]
        return queries, positions, entries, p.to(self._dtype)

    def _ratio(self, start: int) -> Tensor:
        assert self._trace.value_ratio is not None  # keys are normed
        return self._trace.value_ratio[self._span.start + start : self._span.stop]

    def _angles(self, at: slice) -> tuple[Tensor, Tensor]:
        return self._frozen.cos[self._span][at], self._frozen.sin[self._span][at]

    def _angles_of_entries(self, first: int) -> tuple[Tensor, Tensor]:
        """cos and sin at the first positions of the windows from ``first`` on."""
        return self._angles(slice(first * self._rate, self.entries * self._rate, self._rate))


def _from(tile: Tile, start: int) -> Tile:
    """Return the part of a tile for queries and positions from ``start`` on. Entries are all there."""
    queries, positions, entries, p = tile
    later, seen = max(queries.start, start), max(positions.start, start)
    own = p[..., seen - positions.start : positions.stop - positions.start]
    p = torch.cat([own, p[..., positions.stop - positions.start :]], -1)[:, later - queries.start :]
    return slice(later, queries.stop), slice(seen, positions.stop), entries, p


def turn(x: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    """Turn pairs of neighbours among the last r channels of x (..., N, B, d), in place: cos and sin (N, r / 2).

    With ``back`` apply the transpose.
    """
    first = x.shape[-1] - 2 * cos.shape[-1]
    even, odd = x[..., first::2], x[..., first + 1 :: 2]
    cos, sin = (one[:, None].to(x) for one in (cos, -sin if back else sin))
    turned = even * cos - odd * sin
    odd.mul_(cos).add_(even * sin)
    even.copy_(turned)
    return x


def frozen_mixing(
    weights: Attention, trace: AttentionTrace, span: slice, dtype: torch.dtype, scale: Tensor | None = None
) -> FrozenMixing | FrozenKeyed:
    """Return what mixes positions in a layer that is mixed by more than probabilities (``trace.is_mixed``)."""
    return (FrozenMixing if trace.keyed is None else FrozenKeyed)(weights, trace, span, dtype, scale)
