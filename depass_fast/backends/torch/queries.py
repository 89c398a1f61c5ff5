"""The last layer's few queries for the torch backend: one query of every prompt at a time, all prompts at once.

Prompts that fit into the workspace together are neighbours in the state, and one dense block with padding. A prompt
that does not fit by itself is cut into ranges of components, as everywhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...runtime.transfer import all_to_device, to_device
from ...state.layout import Layout
from ...trace.record import AttentionTrace
from ...trace.selection import seen_by_heads
from .blocks import Block


@dataclass(frozen=True, eq=False)
class Asked:
    """One query of each of S prompts, at packed positions ``at`` (S,), and its keys.

    ``keys`` (S, K) are packed positions from each prompt's first on; a slice, those of a single prompt. ``seen`` (S, K)
    is True where a query sees a key, None where it sees all of them.
    """

    at: Tensor
    keys: Tensor | slice
    seen: Tensor | None

    def read(self, x: Tensor) -> Tensor:
        """Return what ``x`` (T, ...) holds at the keys: (S, K, ...)."""
        return x[self.keys] if isinstance(self.keys, Tensor) else x[self.keys][None]


@dataclass(frozen=True, eq=False)
class Round:
    """The results of one query of each of S prompts for B components.

    ``members`` (S,) are the prompts' places in the block, None for all of them. ``made`` (r,) are the living among the
    (S·B) results, None for all. ``residual`` (r,) and ``target`` (r,) are their rows in the state before and after the
    layer; a slice where these are neighbours.
    """

    asked: Asked
    members: Tensor | None
    made: Tensor | None
    residual: Tensor | slice
    target: Tensor | slice


@dataclass(frozen=True, eq=False)
class QueryBlock(Block):
    """A block of one prompt, or of all components of ``n_prompts`` neighbours, and the ``rounds`` of its queries.

    ``n_positions`` counts the places of all prompts: each has as many as the longest.
    """

    n_prompts: int
    rounds: tuple[Round, ...]


def make_query_blocks(
    layout: Layout,
    queries: Layout,
    slots: int,
    trace: AttentionTrace,
    devices: tuple[torch.device, torch.device],
    begin: tuple[int, int] = (0, 0),
) -> list[QueryBlock]:
    """Cut a state into blocks of at most ``slots`` places, or of one component, with the queries that read them.

    ``devices`` are the one that computes and the one of the state. ``begin`` is the prompt and the component to begin
    with.
    """
    maker = _Maker(layout, queries, trace, devices)
    return [maker.make(cut) for cut in _cut(layout, queries, slots, begin)]


@dataclass(frozen=True)
class _Cut:
    """Components ``first`` to ``last`` of ``prompts``, at their positions from ``start`` on."""

    prompts: range
    first: int
    last: int
    start: int = 0


def _cut(layout: Layout, queries: Layout, slots: int, begin: tuple[int, int]) -> Iterator[_Cut]:
    """Group neighbouring prompts as long as all of their components fit into ``slots`` places, padding included."""
    begun, component = begin
    group, longest, widest = range(begun, begun), 0, 0
    for prompt in range(begun, len(layout.components)):
        at, m = layout.segments(prompt), len(layout.components[prompt])
        n, first = at.stop - at.start, component if prompt == begun else 0
        fits = n * m <= slots and not first
        if fits and (len(group) + 1) * max(longest, n) * max(widest, m) <= slots:
            group, longest, widest = range(group.start, prompt + 1), max(longest, n), max(widest, m)
            continue
        if widest:
            yield _Cut(group, 0, widest)
        group, longest, widest = range(prompt, prompt + 1), n, m
        if not fits:
            yield from _cut_components(layout, queries, slots, prompt, first)
            group, longest, widest = range(prompt + 1, prompt + 1), 0, 0
    if widest:  # a rank may have no components of these prompts
        yield _Cut(group, 0, widest)


def _cut_components(layout: Layout, queries: Layout, slots: int, prompt: int, first: int) -> Iterator[_Cut]:
    """Cut one prompt's components from ``first`` on into ranges, as far as a query reads them."""
    counts, components = layout.counts[layout.segments(prompt)], layout.components[prompt]
    last_read = int(queries.local[queries.segments(prompt)].max(initial=-1))
    while first < len(components):
        birth = int(np.searchsorted(counts, first, side="right"))  # the first position that has it
        if birth > last_read:
            return
        size = max(1, slots // (last_read + 1 - birth))
        if components.births.any():  # components born together share the positions that none of them reaches
            size = min(size, max(64, len(counts) // 4))
        last = min(first + size, len(components))
        yield _Cut(range(prompt, prompt + 1), first, last, birth)
        first = last


class _Maker:
    """Makes the blocks of a state and their tables; a prompt whose components are cut asks with the same ones."""

    def __init__(
        self, layout: Layout, queries: Layout, trace: AttentionTrace, devices: tuple[torch.device, torch.device]
    ) -> None:
        self.layout, self.queries, self.trace, self.devices = layout, queries, trace, devices
        self._asked: dict[bytes, Asked] = {}

    def make(self, cut: _Cut) -> QueryBlock:
        layout, places, prompts = self.layout, np.arange(cut.first, cut.last), cut.prompts
        spans = [layout.segments(prompt) for prompt in prompts]
        if len(spans) == 1:  # nobody sees later positions
            read = self.queries.local[self.queries.segments(prompts[0])].max(initial=-1)
            spans = [slice(spans[0].start + cut.start, spans[0].start + int(read) + 1)]
        n = max(span.stop - span.start for span in spans)
        alive = [places < layout.counts[span, None] for span in spans]
        rows = [(layout.starts[:-1][span, None] + places)[here] for span, here in zip(spans, alive, strict=True)]
        slots = np.concatenate([i * n * len(places) + np.flatnonzero(here) for i, here in enumerate(alive)])
        return QueryBlock(
            prompt=prompts[0],
            start=cut.start,
            first=cut.first,
            n_positions=len(spans) * n,
            n_components=len(places),
            rows=_neighbours(np.concatenate(rows), self.devices[0]),
            slots=None if len(slots) == len(spans) * n * len(places) else to_device(slots, self.devices[0]),
            ragged=len(spans) * n,
            n_prompts=len(spans),
            rounds=tuple(self._rounds(prompts, places)),
        )

    def _rounds(self, prompts: range, places: np.ndarray) -> Iterator[Round]:
        """Make as many rounds as a prompt has queries that meet any of these components."""
        layout, queries = self.layout, self.queries
        reads = [np.arange(s.start, s.stop) for s in map(queries.segments, prompts)]
        reads = [segments[queries.counts[segments] > places[0]] for segments in reads]
        for turn in range(max(map(len, reads))):
            members = [i for i, segments in enumerate(reads) if turn < len(segments)]
            segments = np.array([reads[i][turn] for i in members])  # (S,) of the queries
            begins = np.array([layout.segments(prompts[i]).start for i in members])
            alive = places < queries.counts[segments, None]
            before = begins + queries.local[segments]
            yield Round(
                asked=self._ask(segments, begins),
                members=None if len(members) == len(prompts) else to_device(np.array(members), self.devices[0]),
                made=None if alive.all() else to_device(np.flatnonzero(alive), self.devices[0]),
                residual=_neighbours((layout.starts[before, None] + places)[alive], self.devices[1]),
                target=_neighbours((queries.starts[segments, None] + places)[alive], self.devices[1]),
            )

    def _ask(self, segments: np.ndarray, begins: np.ndarray) -> Asked:
        """Make the tables of the queries ``segments`` (S,) of prompts whose first segments are ``begins`` (S,)."""
        if segments.tobytes() not in self._asked:
            local = self.queries.local[segments, None]
            k = np.arange(int(local.max()) + 1)
            seen = k <= local
            seen &= k >= np.vectorize(self.trace.first_seen)(local)
            keys = self.layout.packed[begins[:, None] + np.minimum(k, local)]  # padding is seen by nobody
            tables = [self.queries.packed[segments], keys, seen.astype(np.uint8)]
            at, keys_there, seen_there = all_to_device(tables, self.devices[0])
            only = slice(int(keys[0, 0]), int(keys[0, -1]) + 1)
            self._asked[segments.tobytes()] = Asked(
                at, only if len(keys) == 1 else keys_there, None if seen.all() else seen_there.view(torch.bool)
            )
        return self._asked[segments.tobytes()]


def _neighbours(rows: np.ndarray, device: torch.device) -> Tensor | slice:
    """Rows (r,) on a device, or as a slice where they are neighbours."""
    if len(rows) and rows[-1] - rows[0] + 1 == len(rows):
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return to_device(rows, device)


def query_probabilities(trace: AttentionTrace, asked: Asked, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return P · s of one query of each prompt, s being ``scale`` (T,) or (T, Hkv): (S, H, K), in ``scale``'s dtype."""
    wide, n_kv = scale.dtype, trace.k.shape[1]
    q = trace.q[asked.at].to(wide).unflatten(1, (n_kv, -1))  # (S, Hkv, G, d)
    k = asked.read(trace.k).to(wide).permute(0, 2, 3, 1)  # (S, Hkv, d, K)
    logits = (q @ k).mul_(trace.scale)
    if trace.softcap is not None:
        logits = torch.tanh(logits / trace.softcap).mul_(trace.softcap)
    logits = logits.flatten(1, 2)
    if trace.key_bias is not None:
        logits += asked.read(trace.key_bias).to(wide).transpose(1, 2)
    if asked.seen is not None:
        logits.masked_fill_(~asked.seen[:, None], -torch.inf)
    if trace.chosen_keys is not None:
        chosen = trace.chosen_keys[asked.at][:, None]  # of one query of each prompt
        seen = seen_by_heads(chosen, logits.shape[-1], trace.key_block, logits.shape[1])
        logits.masked_fill_(~seen[:, :, 0], -torch.inf)
    p, columns = logits.softmax(-1), asked.read(scale)  # (S, K) or (S, K, Hkv)
    if columns.ndim == 2:
        p.mul_(columns[:, None])
    else:
        p.mul_(columns.transpose(1, 2).repeat_interleave(p.shape[1] // n_kv, 1))
    if trace.row_sum is not None:
        p *= trace.row_sum[asked.at].to(wide)[..., None]
    if trace.out_scale is not None:
        p *= trace.out_scale[asked.at].to(wide)[:, None, None]
    return p.to(dtype)


def mix_queries(p: Tensor, x: Tensor) -> Tensor:
    """Apply P (S, H, K) to the keys' rows x (S, K', C), of which the first K count: (H, S, C)."""
    x = x[:, : p.shape[2]]
    if len(p) == 1:
        return (p[0] @ x[0])[:, None]
    out = x.new_empty(p.shape[1], len(p), x.shape[2])  # the heads of a group side by side
    torch.bmm(p, x, out=out.transpose(0, 1))
    return out
