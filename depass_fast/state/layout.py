"""The layout of a component state: its rows, each with its component and its position.

A *row* is one component at one position. Rows are grouped by position. A component that does not exist yet at a
position (token m before position m) has no row there. Within a prompt the components are ordered by the position of
their birth: first those that live everywhere (`rest`, `bias`, heads, neurons, ...), then tokens as they appear. So the
components alive at a position are always the first ``count`` ones, and row ``start[position] + m`` is component m: no
index per row is ever stored. A rectangle (N, M, D) is the case of equal counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..runtime.brief import brief_repr
from ..runtime.transfer import all_to_device


@dataclass(frozen=True)
class Components:
    """The components of one prompt, in row order: the extras (`rest`, `bias`), then the named ones.

    ``births`` (M,) is the first position at which each is alive, non-decreasing. ``excluded`` (M,) marks special
    tokens, which take part in the allocation at the position of their birth only.

    A state may hold a part of a prompt's components (:meth:`only`). ``whole`` are then all of them, and ``places`` (M,)
    those of the part among them, in order. With ``embedded`` the named ones are the model's tokens from its beginning:
    what a later layer embeds at a position is a part of the token there.
    """

    extras: tuple[str, ...]
    names: tuple[str, ...]
    births: np.ndarray
    excluded: np.ndarray
    whole: Components | None = None
    places: np.ndarray | None = None
    embedded: bool = False

    @staticmethod
    def everywhere(names: tuple[str, ...], extras: tuple[str, ...]) -> Components:
        """Components that live at every position."""
        m = len(names) + len(extras)
        return Components(extras, names, np.zeros(m, np.int64), np.zeros(m, bool))

    @staticmethod
    def tokens(
        names: tuple[str, ...], extras: tuple[str, ...], excluded: set[int], embedded: bool = False
    ) -> Components:
        """One component per position, born there. ``excluded`` holds the positions of special tokens."""
        births = np.concatenate([np.zeros(len(extras), np.int64), np.arange(len(names))])
        flags = np.zeros(len(births), bool)
        flags[[len(extras) + n for n in excluded]] = True
        return Components(extras, names, births, flags, embedded=embedded)

    __repr__ = brief_repr

    def __len__(self) -> int:
        return len(self.births)

    def only(self, places: np.ndarray) -> Components:
        """Some of the components, at ``places`` (m,) in order, which know those that they are a part of."""
        n_extras = len(self.extras)
        extras = tuple(self.extras[i] for i in places if i < n_extras)
        names = tuple(self.names[i - n_extras] for i in places if i >= n_extras)
        return Components(extras, names, self.births[places], self.excluded[places], self, places, self.embedded)

    @property
    def all(self) -> Components:
        """All components of the prompt, of which these are a part or the whole."""
        return self if self.whole is None else self.whole

    @property
    def members(self) -> np.ndarray:
        """The places (M,) of these components among all of the prompt."""
        return np.arange(len(self)) if self.places is None else self.places

    @property
    def named(self) -> np.ndarray:
        """The places of the named components of these among all named ones of the prompt."""
        return self.members[len(self.extras) :] - len(self.all.extras)

    @property
    def labels(self) -> list[str]:
        """The labels in the order that users see: the named components, then `rest` and `bias`."""
        return [*self.names, *self.extras]

    def index(self, extra: str) -> int | None:
        """The row of an extra component within a position, or None."""
        return self.extras.index(extra) if extra in self.extras else None

    def alive(self, positions: np.ndarray) -> np.ndarray:
        """The number of components alive at each position: (S,) -> (S,)."""
        return np.searchsorted(self.births, positions, side="right")


@dataclass(frozen=True, eq=False)
class Layout:
    """The rows of a state, as segments: a segment is a position that carries rows.

    Every segment has its ``prompt`` (S,), its position ``local`` (S,) within the prompt and ``packed`` (S,) in the
    trace, and its number of rows, ``counts`` (S,). ``starts`` (S + 1,) is the first row of every segment. Segments of a
    prompt follow each other in order.

    In a joint layout (:meth:`join`) a position carries one segment per decomposition, one after the other, and each
    decomposition's prompts are prompts of their own. ``positions`` is the same rows with one segment per position, as
    attention sees them. ``joined`` are the layouts that it was made of.
    """

    components: tuple[Components, ...]
    prompt: np.ndarray
    local: np.ndarray
    packed: np.ndarray
    counts: np.ndarray
    starts: np.ndarray
    positions: Layout | None = None
    joined: tuple[Layout, ...] = ()

    __repr__ = brief_repr

    @cached_property
    def _tensors(self) -> dict[tuple[str, torch.device], Tensor]:
        return {}

    def tensor(self, name: str, device: torch.device) -> Tensor:
        """One of the arrays on a device, kept there with the others: int64, but `segment_of` (R,) is int32."""
        if (name, device) not in self._tensors:
            names = ("prompt", "local", "packed", "counts", "starts", "segment_of")
            arrays = [getattr(self, name) for name in names[:-1]] + [self.row_segments().astype(np.int32)]
            for one, tensor in zip(names, all_to_device(arrays, device), strict=True):
                self._tensors[one, device] = tensor
        return self._tensors[name, device]

    @property
    def by_position(self) -> Layout:
        """The same rows with one segment per position."""
        return self.positions or self

    @staticmethod
    def join(layouts: Sequence[Layout]) -> Layout:
        """Join decompositions of the same positions, position by position. Their components must live everywhere.

        Prompt p of the d-th layout becomes prompt d · P + p.
        """
        parts, count = range(len(layouts)), len(layouts[0].components)
        prompt = np.stack([layout.prompt + d * count for d, layout in enumerate(layouts)], 1).flatten()
        local, packed = (np.repeat(getattr(layouts[0], name), len(layouts)) for name in ("local", "packed"))
        counts = np.stack([layout.counts for layout in layouts], 1)
        together = []
        for p in range(count):
            size = sum(len(layouts[d].components[p]) for d in parts)
            together.append(Components((), (), np.zeros(size, np.int64), np.zeros(size, bool)))
        first = layouts[0]
        wide = Layout(tuple(together), first.prompt, first.local, first.packed, *_counted(counts.sum(1)))
        components = tuple(c for layout in layouts for c in layout.components)
        return Layout(components, prompt, local, packed, *_counted(counts.flatten()), wide, tuple(layouts))

    @staticmethod
    def of(
        components: tuple[Components, ...], offsets: np.ndarray, positions: list[np.ndarray] | None = None
    ) -> Layout:
        """Rows for all positions of every prompt, or for the given local ``positions`` of each."""
        if positions is None:
            positions = [np.arange(length) for length in np.diff(offsets)]
        prompt = np.repeat(np.arange(len(components)), [len(p) for p in positions])
        local = np.concatenate(positions).astype(np.int64)
        counts = np.concatenate([c.alive(p) for c, p in zip(components, positions, strict=True)]).astype(np.int64)
        return Layout(components, prompt, local, offsets[prompt] + local, *_counted(counts))

    def at(self, offsets: np.ndarray, positions: list[np.ndarray]) -> Layout:
        """This layout, joint or not, restricted to local ``positions`` of every prompt."""
        parts = [Layout.of(part.components, offsets, positions) for part in self.apart()]
        return parts[0] if len(parts) == 1 else Layout.join(parts)

    def only(self, segments: np.ndarray) -> Layout:
        """The layout of some of the segments (S',), in that order."""
        prompt, local, packed = self.prompt[segments], self.local[segments], self.packed[segments]
        return Layout(self.components, prompt, local, packed, *_counted(self.counts[segments]))

    @property
    def all(self) -> Layout:
        """The layout of all components of the prompts at the same positions, where this one may hold a part of them."""
        whole = tuple(components.all for components in self.components)
        alive = [whole[prompt].alive(local) for prompt, local in zip(self.prompt, self.local, strict=True)]
        return Layout(whole, self.prompt, self.local, self.packed, *_counted(np.array(alive, np.int64)))

    def rows_of(self, segments: np.ndarray) -> np.ndarray:
        """The rows of some of the segments (S',), one segment after the other."""
        counts = self.counts[segments]
        ends = np.cumsum(counts)
        return np.arange(ends[-1] if len(ends) else 0) + np.repeat(self.starts[segments] - (ends - counts), counts)

    def apart(self) -> tuple[Layout, ...]:
        """The layouts that were joined, or this one."""
        return self.joined or (self,)

    def find(self, other: Layout) -> np.ndarray:
        """The segments here that have the prompt and position of the segments of ``other`` (S',): (S',).

        Raises:
            KeyError: one of them is at a position that this layout does not have.
        """
        span = int(self.packed.max(initial=0)) + 1
        keys, wanted = (layout.prompt * span + layout.packed for layout in (self, other))
        order = np.argsort(keys, kind="stable")
        places = np.searchsorted(keys, wanted, sorter=order)
        found = order[np.minimum(places, len(order) - 1)]
        if other.packed.max(initial=0) >= span or not np.array_equal(keys[found], wanted):
            raise KeyError("these rows are at positions that the layout does not have")
        return found

    @property
    def n_rows(self) -> int:
        return int(self.starts[-1])

    def segments(self, prompt: int) -> slice:
        """The segments of one prompt."""
        return slice(*(int(i) for i in np.searchsorted(self.prompt, [prompt, prompt + 1])))

    def row_segments(self, segments: slice | None = None) -> np.ndarray:
        """The segment of every row, or of every row of a range of segments."""
        segments = segments or slice(0, len(self.counts))
        return np.repeat(np.arange(segments.start, segments.stop), self.counts[segments])

    def rows(self, prompt: int) -> slice:
        """The rows of one prompt."""
        segments = self.segments(prompt)
        return slice(int(self.starts[segments.start]), int(self.starts[segments.stop]))

    def index(self, extra: str) -> int | None:
        """The row of `rest` or `bias` within every segment, the same for all prompts; None if there is none."""
        return self.components[0].index(extra)

    def extra_rows(self, extra: str) -> np.ndarray:
        """The rows of `rest` or `bias`, one per segment. It must be one of the extras."""
        return self.starts[:-1] + self.index(extra)

    def token_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """The segments where the token of the position is among the components, and its row in each.

        All components must be tokens; a state may hold a part of them.
        """
        last, own = self.counts - 1, np.zeros(len(self.counts), bool)
        for prompt, components in enumerate(self.components):
            here = self.segments(prompt)
            named = last[here] >= len(components.extras)
            own[here] = named & (components.births[last[here]] == self.local[here]) if len(components) else False
        return np.flatnonzero(own), (self.starts[1:] - 1)[own]


def _counted(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts (S,) and the first row of every segment (S + 1,)."""
    starts = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    return counts, starts
