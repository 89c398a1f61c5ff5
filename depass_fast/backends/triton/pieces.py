"""The pieces of a state for the triton backend, and the tables that its kernels read for each.

A piece is either whole prompts, neighbours in the state, or a range of one prompt's components, of every position
those that are alive: it can be carried through attention alone, since components do not meet there. The tables are
made once per layout and live on the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...kernels.attention import Keys
from ...kernels.rows import Rows
from ...runtime.transfer import all_to_device, to_device
from ...state.layout import Layout
from ..active import Groups
from ..torch.blocks import away_from_home, last_segment


@dataclass(frozen=True)
class Place:
    """A regular place in a state: ``n`` runs of ``count`` rows from ``first`` on, ``stride`` rows apart."""

    first: int
    n: int
    count: int
    stride: int

    def of(self, rows: Tensor) -> Tensor:
        """The rows (R, D) of a state in this place, as a view: (n, count, D)."""
        width = rows.shape[1]
        offset = rows.storage_offset() + self.first * width
        return rows.as_strided((self.n, self.count, width), (self.stride * width, width, 1), offset)


@dataclass(frozen=True, eq=False)
class Piece:
    """Components ``first`` to ``last`` of the prompts ``prompts``, their rows, and the work of the mixing kernel.

    ``positions`` (S,) int64 are packed positions; ``items`` are tiles of (query, head) rows times ranges of components,
    for :func:`depass_fast.kernels.attention.mix`; ``longest`` is the number of positions of the longest prompt.
    ``place`` is where the rows are in the state, if that is a regular place.
    """

    prompts: range
    first: int
    rows: Rows
    keys: Keys
    items: Tensor
    positions: Tensor
    longest: int
    place: Place | None


class Cut(NamedTuple):
    """Components ``first`` to ``last`` of ``prompts``, or with ``last`` None all components of whole prompts."""

    prompts: range
    first: int
    last: int | None


def cut(layout: Layout, max_rows: int, begin: tuple[int, int] = (0, 0), extras_only: bool = False) -> list[Cut]:
    """Cut the components, or the extras alone, into ranges of at most ``max_rows`` rows, or of one component.

    ``begin`` is the prompt and the component to begin with.
    """
    cuts: list[Cut] = []
    held = 0  # rows of the whole prompts in the last cut
    for prompt in range(begin[0], len(layout.components)):
        counts = layout.counts[layout.segments(prompt)]
        first, rows = begin[1] if prompt == begin[0] else 0, int(counts.sum())
        if not rows:
            continue
        if extras_only or first > 0 or rows > max_rows:
            components = layout.components[prompt]
            last = len(components.extras) if extras_only else len(components)
            cuts += _cuts(prompt, counts, first, last, max_rows)
            continue
        before = cuts[-1] if cuts else None
        if before and before.last is None and before.prompts.stop == prompt and held + rows <= max_rows:
            cuts[-1] = Cut(range(before.prompts.start, prompt + 1), 0, None)
            held += rows
        else:
            cuts.append(Cut(range(prompt, prompt + 1), 0, None))
            held = rows
    return cuts


def _cuts(prompt: int, counts: np.ndarray, first: int, last: int, max_rows: int) -> Iterator[Cut]:
    """Components ``first`` to ``last`` of a prompt in ranges of at most ``max_rows`` rows, or of one component."""
    while first < last:
        born = int(np.searchsorted(counts, first, side="right"))  # the first position that has it
        if born == len(counts):
            return
        end = min(last, first + max(1, max_rows // (len(counts) - born)))
        yield Cut(range(prompt, prompt + 1), first, end)
        first = end


def make_piece(
    layout: Layout, prompts: range, first: int, last: int | None, tile: int, groups: int, device: torch.device
) -> Piece:
    """The tables of one piece; ``last`` None: all components. ``tile`` is rows of (query, head) per item."""
    segments, begins, births, items = [], [0], [], []
    for prompt in prompts:
        at = layout.segments(prompt)
        counts = layout.counts[at]
        stop = len(layout.components[prompt]) if last is None else last
        born = np.searchsorted(counts, np.arange(first, stop), side="right")  # position of birth, by component
        here = np.arange(at.start, at.stop)[int(born[0]) :]
        n = len(here)
        segments.append(here)
        items.append(_items(begins[-1], n, born - born[0], sum(map(len, births)), int(born[0]), tile, groups))
        births.append(born - born[0])
        begins.append(begins[-1] + n)
    chosen = np.concatenate(segments)
    count = layout.counts[chosen] - first if last is None else np.minimum(layout.counts[chosen], last) - first
    base = np.concatenate([[0], np.cumsum(count)])
    packed, whole = layout.packed[chosen], last is None
    tables = [np.repeat(np.arange(len(chosen)), count), packed, count, np.concatenate(births), np.concatenate(items)]
    wide = [base, packed, layout.starts[chosen] + first]
    made = all_to_device([x.astype(np.int32) for x in tables] + [x.astype(np.int64) for x in wide], device)
    segment, keys, count_there, births_there, items_there, base_there, positions, source = made
    rows = Rows(segment, base_there, None if whole else source, int(layout.starts[chosen[0]]) if whole else 0)
    longest = int(np.diff(begins).max())
    return Piece(
        prompts,
        first,
        rows,
        Keys(keys, base_there, count_there, births_there),
        items_there,
        positions,
        longest,
        _place(layout.starts[chosen] + first, count, whole),
    )


def _place(firsts: np.ndarray, counts: np.ndarray, whole: bool) -> Place | None:
    """Return the place of runs of ``counts`` rows from ``firsts`` on, if they are neighbours or regular ones."""
    if whole:
        return Place(int(firsts[0]), 1, int(counts.sum()), 0)
    steps = np.diff(firsts)
    if (counts != counts[0]).any() or (len(steps) and (steps != steps[0]).any()):
        return None
    return Place(int(firsts[0]), len(counts), int(counts[0]), int(steps[0]) if len(steps) else 0)


def query_tables(layout: Layout, tile: int, groups: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Items of all prompts, see :func:`query_tiles`, and the packed positions (S,) int32; alike layouts share them."""
    lengths = np.bincount(layout.prompt, minlength=len(layout.components))
    return _query_tables(lengths.tobytes(), layout.packed.tobytes(), tile, groups, device)


@lru_cache(maxsize=8)
def _query_tables(lengths: bytes, packed: bytes, tile: int, groups: int, device: torch.device) -> tuple[Tensor, Tensor]:
    tiles = query_tiles(np.frombuffer(lengths, np.int64), tile, groups, device)
    return tiles, to_device(np.frombuffer(packed, np.int64).astype(np.int32), device)


def query_tiles(lengths: np.ndarray, tile: int, groups: int, device: torch.device) -> Tensor:
    """Items of whole prompts that follow each other, for :func:`depass_fast.kernels.probabilities.log_sum_exp`."""
    begins = np.concatenate([[0], np.cumsum(lengths)])
    parts = [_tiles(int(b), int(n), tile, groups) for b, n in zip(begins[:-1], lengths, strict=True)]
    return to_device(np.concatenate(parts), device)


def _tiles(begin: int, n: int, tile: int, groups: int) -> np.ndarray:
    firsts = np.arange(0, n * groups, tile)
    table = np.zeros((len(firsts), 7), np.int32)
    table[:, 0], table[:, 1], table[:, 2] = begin, begin + n, firsts
    return table


def _items(begin: int, n: int, births: np.ndarray, offset: int, before: int, tile: int, groups: int) -> np.ndarray:
    """Tiles times ranges of components, without those that no query of the tile has a row of; the longest first."""
    tiles = _tiles(begin, n, tile, groups)
    step = min(len(births), 16 if n > 64 else 32)
    ranges = np.arange(0, len(births), step)
    table = np.repeat(tiles, len(ranges), 0)
    table[:, 3] = np.tile(ranges, len(tiles))
    table[:, 4] = np.minimum(table[:, 3] + step, len(births))
    table[:, 5], table[:, 6] = offset, before
    last_query = np.minimum((table[:, 2] + tile - 1) // groups, n - 1)
    return table[births[table[:, 3]] <= last_query][::-1]


@dataclass(frozen=True, eq=False)
class RowChunk:
    """Whole positions for the MLP: a range of segments, and their rows, which are neighbours in the state.

    ``away`` (r,) uint8 marks special tokens away from home, None where there are none; ``longest`` is the largest
    segment's length.
    """

    segments: slice
    rows: Rows
    longest: int
    away: Tensor | None

    @property
    def n_rows(self) -> int:
        return len(self.rows)


def make_row_chunks(
    layout: Layout,
    max_rows: int,
    device: torch.device,
    first: int = 0,
    groups: Groups | None = None,
    positions: int | None = None,
) -> list[RowChunk]:
    """Cut the segments from ``first`` on into chunks of at most ``max_rows`` rows, or of one segment.

    No chunk has segments of two ``groups``, or more of them than ``positions``.
    """
    segment_of, starts = layout.tensor("segment_of", device), layout.tensor("starts", device)
    away = away_from_home(layout)
    flags = to_device(away.astype(np.uint8), device) if away.any() else None
    chunks, n = [], len(layout.counts)
    while first < n:
        last = last_segment(layout, max_rows, first, groups, positions)
        begin, end = int(layout.starts[first]), int(layout.starts[last])
        if end > begin:
            segment, base = segment_of[begin:end], starts[first : last + 1]
            rows = Rows(segment - first, base - begin, first=begin) if begin or first else Rows(segment, base)
            longest = int(layout.counts[first:last].max())
            here = None if flags is None or not away[begin:end].any() else flags[begin:end]
            chunks.append(RowChunk(slice(first, last), rows, longest, here))
        first = last
    return chunks
