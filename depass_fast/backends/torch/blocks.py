"""The pieces of a state for the torch backend: blocks of components for attention, chunks of positions for the MLP.

A cut never passes through what belongs together: a component's positions in attention, a position's components in
the allocation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...runtime.transfer import to_device
from ...state.layout import Layout
from ..active import Groups


@dataclass(frozen=True, eq=False)
class Block:
    """Components from ``first`` on of one prompt, at its segments from ``start`` on, where they can be alive.

    ``rows`` (r,) are the state's rows, ``slots`` (r,) their places in the dense (N - start, n_components) block, or
    None where all of it is alive. From its position ``ragged`` on no component is missing.
    """

    prompt: int
    start: int
    first: int
    n_positions: int
    n_components: int
    rows: Tensor | slice
    slots: Tensor | None
    ragged: int


@dataclass(frozen=True, eq=False)
class Chunk:
    """Whole positions for the MLP: a range of segments and their rows. Some rows may take no part in the softmax."""

    segments: slice
    rows: slice
    counts: list[int]  # rows per segment
    segment_of: Tensor  # segment of every row
    away: Tensor | None  # within ``rows``: special tokens away from home
    deserted: bool  # some segment has nobody else


def make_blocks(
    layout: Layout,
    slots: int,
    device: torch.device,
    extras_only: bool = False,
    begin: tuple[int, int] = (0, 0),
) -> list[Block]:
    """Cut every prompt's components, or its extras, into blocks of at most ``slots`` places, or of one component.

    ``begin`` is the prompt and the component to begin with.
    """
    blocks = []
    for prompt, components in enumerate(layout.components):
        if prompt < begin[0]:
            continue
        segments = layout.segments(prompt)
        starts, counts = layout.starts[segments], layout.counts[segments]
        n, m = len(starts), len(components.extras) if extras_only else len(components)
        first = begin[1] if prompt == begin[0] else 0
        staggered = bool(components.births.any())
        while first < m:
            birth = int(np.searchsorted(counts, first, side="right"))  # the first position that has it
            if birth == n:
                break  # nor any later one
            size = max(1, slots // (n - birth))
            if staggered:  # components born together share the positions that none of them reaches
                most = max(64, n // 4)
                of_ranks = int(np.searchsorted(components.births, components.births[first] + most)) - first
                size = min(size, most, of_ranks)  # those of a rank of several are born at a distance
            last = min(first + size, m)
            places = starts[birth:, None] + np.arange(first, last)
            alive = np.arange(first, last) < counts[birth:, None]
            whole_here = alive.all(1)
            ragged = 0 if whole_here.all() else int(np.flatnonzero(~whole_here)[-1]) + 1
            slot = to_device(np.flatnonzero(alive), device) if ragged else None
            whole = last - first == len(components)
            rows = layout.rows(prompt) if whole else to_device(places[alive], device)
            blocks.append(Block(prompt, birth, first, n - birth, last - first, rows, slot, ragged))
            first = last
    return blocks


def make_chunks(
    layout: Layout,
    max_rows: int,
    device: torch.device,
    first: int = 0,
    groups: Groups | None = None,
    positions: int | None = None,
) -> list[Chunk]:
    """Cut the segments from ``first`` on into chunks of at most ``max_rows`` rows, or of one segment.

    No chunk has segments of two ``groups``, or more of them than ``positions``.
    """
    segment_of_row, away = layout.row_segments(), away_from_home(layout)
    chunks, n = [], len(layout.counts)
    while first < n:
        last = last_segment(layout, max_rows, first, groups, positions)
        rows = slice(int(layout.starts[first]), int(layout.starts[last]))
        gone = np.flatnonzero(away[rows])
        counts = layout.counts[first:last]
        absent = np.bincount(segment_of_row[rows][gone] - first, minlength=last - first)
        chunks.append(
            Chunk(
                segments=slice(first, last),
                rows=rows,
                counts=counts.tolist(),
                segment_of=to_device(segment_of_row[rows], device),
                away=to_device(gone, device) if len(gone) else None,
                deserted=bool((absent == counts).any()),
            )
        )
        first = last
    return chunks


def last_segment(
    layout: Layout, max_rows: int, first: int, groups: Groups | None = None, positions: int | None = None
) -> int:
    """The end of a chunk that begins at ``first``: of one group, and of at most ``max_rows`` rows or one segment.

    It has no more segments than ``positions``.
    """
    last = int(np.searchsorted(layout.starts, layout.starts[first] + max_rows, side="right")) - 1
    last = min(max(last, first + 1), len(layout.counts), first + (positions or len(layout.counts)))
    return last if groups is None else min(last, groups.end(first))


def away_from_home(layout: Layout) -> np.ndarray:
    """Mark the rows that are special tokens at another position than their own: (R,) bool."""
    segment_of_row = layout.row_segments()
    component = np.arange(layout.n_rows) - layout.starts[segment_of_row]
    away = np.zeros(layout.n_rows, bool)
    for prompt, components in enumerate(layout.components):
        if components.excluded.any():
            r = layout.rows(prompt)
            m = component[r]
            away[r] = components.excluded[m] & (components.births[m] != layout.local[segment_of_row[r]])
    return away


def scatter(rows: Tensor, block: Block) -> Tensor:
    """Put a block's rows (r, C) in their places: (N', B, C), zero where not alive."""
    if block.slots is None:
        return rows.view(-1, block.n_components, rows.shape[1])
    dense = rows.new_zeros(block.n_positions * block.n_components, rows.shape[1])
    return dense.index_copy_(0, block.slots, rows).view(block.n_positions, block.n_components, -1)


def scatter_within(dense: Tensor, block: Block, count: int) -> Tensor:
    """Move a block's rows, the last ``count`` of ``dense`` (N'·B, C), to their places: (N', B, C), zero elsewhere.

    Rows of positions that have all components are there already.
    """
    if block.slots is not None:
        first = block.ragged * block.n_components
        moved = count - (len(dense) - first)
        rows = dense[len(dense) - count :][:moved].clone()
        dense[:first].zero_().index_copy_(0, block.slots[:moved], rows)
    return dense.view(block.n_positions, block.n_components, -1)


def gather(dense: Tensor, block: Block) -> Tensor:
    """Return the rows (r, C) of a block in their places, (N', B, C): the undoing of ``scatter``.

    They are the last of ``dense``, what comes before them is used up.
    """
    dense = dense.flatten(0, 1)
    if block.slots is None:
        return dense
    first = block.ragged * block.n_components
    moved = len(block.slots) - (len(dense) - first)
    dense[first - moved : first] = dense.index_select(0, block.slots[:moved])
    return dense[first - moved :]
