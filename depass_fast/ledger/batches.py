"""Packed prompts on the way back: where gradients arrive, sums over a prompt's positions, batches for attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..runtime.transfer import to_device

Made = TypeVar("Made")

_SHORT = 64  # prompts of up to so many positions go together, whatever their lengths
_KEPT = 1 << 20  # elements of a mask above which it is not kept
_PIECE = 64  # positions whose scores a kernel adds up at a time
_ALIKE = 0.8  # others if they are so long, relative to the longest


@dataclass(frozen=True, eq=False)
class Batch:
    """B prompts of up to N positions, of which Q each are queries: those where gradients arrive.

    keys (B, N) are packed positions, those of padding the prompt's last. local (B, Q) are the queries' positions in
    their prompts, slots (B, Q) their rows among the gradients that arrive. ``padded`` (B, Q) marks queries that are
    none, None where all are. ``filled`` are the places in (B · N,) that are no padding, and ``packed`` their packed
    positions; None where that is all, in order, from ``first`` on. ``prompts`` (B,) are their numbers.
    """

    prompts: Tensor
    keys: Tensor
    local: Tensor
    slots: Tensor
    padded: Tensor | None
    filled: Tensor | None
    packed: Tensor | None
    first: int
    causal: bool  # the queries are all positions
    _masks: dict[tuple, Tensor] = field(default_factory=dict)

    def take(self, x: Tensor) -> Tensor:
        """Return values (T, ...) at the prompts' positions: (B, N, ...)."""
        b, n = self.keys.shape
        return x[self.first : self.first + b * n].view(b, n, *x.shape[1:]) if self.filled is None else x[self.keys]

    def mask(
        self,
        prompts: slice,
        queries: slice,
        keys: slice,
        window: int | None,
        chunked: bool,
        dtype: torch.dtype,
    ) -> Tensor:
        """Return -inf where a query does not see a key, else zero: (b, Q', K), b = 1 where all prompts are alike.

        All layers share it.
        """
        alike = self.causal and self.padded is None
        which = (0 if alike else prompts.start, 1 if alike else prompts.stop)
        at = (queries.start, queries.stop, keys.start, keys.stop)
        if alike and not chunked:  # only the distance of queries and keys counts
            at = (queries.start - keys.start, queries.stop - queries.start, keys.stop - keys.start)
        key = (*which, *at, window, chunked, dtype)
        if key not in self._masks:
            local = self.local[slice(*which), queries, None]
            places = torch.arange(keys.start, keys.stop, device=local.device)
            hidden = places > local
            if window is not None:
                hidden |= places < (local // window * window if chunked else local - window + 1)
            mask = torch.zeros(hidden.shape, dtype=dtype, device=local.device).masked_fill_(hidden, -torch.inf)
            if mask.numel() > _KEPT:
                return mask
            self._masks[key] = mask
        return self._masks[key]

    def put(self, out: Tensor, values: Tensor) -> None:
        """Write values (R, B, N, C) to the prompts' positions in ``out`` (R, T, C)."""
        flat = values.flatten(1, 2)
        if self.filled is None:
            out[:, self.first : self.first + flat.shape[1]] = flat
        else:
            out[:, self.packed] = flat[:, self.filled]

    def at_queries(self, x: Tensor) -> Tensor:
        """Return values (T, ...) at the queries: (B, Q, ...)."""
        return self.take(x) if self.causal else x[self.keys.gather(1, self.local)]

    def gradients(self, y: Tensor) -> Tensor:
        """Return gradients (R, A, C) at the queries, zero where there is none: (R, B, Q, C)."""
        b, q = self.slots.shape
        if self.filled is None and self.causal:
            return y[:, self.first : self.first + b * q].view(len(y), b, q, -1)
        taken = y[:, self.slots.flatten()].view(len(y), b, q, -1)
        return taken if self.padded is None else taken.masked_fill(self.padded[None, ..., None], 0.0)


class Packing:
    """P prompts of T packed positions, read at some of these; ``reads`` are the read positions of every prompt.

    In front of the last layer's attention gradients arrive at the A packed positions that are read (``partial``), from
    there on at all.
    """

    def __init__(self, offsets: np.ndarray, reads: Sequence[Sequence[int]]) -> None:
        self.offsets, self.reads = offsets, [np.unique(np.array(at, np.int64)) for at in reads]
        self.n_prompts, self.n_positions = len(offsets) - 1, int(offsets[-1])
        self.host_at = np.concatenate([first + at for first, at in zip(offsets[:-1], self.reads, strict=True)])
        self._kept: dict[tuple, Any] = {}

    @property
    def lengths(self) -> list[int]:
        """The positions of every prompt."""
        return np.diff(self.offsets).tolist()

    def forget(self) -> None:
        """Let go of the tables that only a way back needs."""
        self._kept.clear()

    def at(self, partial: bool, device: torch.device) -> Tensor | None:
        """The packed positions (A,) where gradients arrive; None: at all."""
        return self._keep("at", device, lambda: to_device(self.host_at, device)) if partial else None

    def batches(self, partial: bool, device: torch.device) -> list[Batch]:
        """The prompts in batches of about equal lengths."""
        return self._keep(("batches", partial), device, lambda: self._batches(partial, device))

    def sum(self, values: Tensor, partial: bool, part: slice = slice(None)) -> Tensor:
        """Sum values (R, A', ...) at a ``part`` of the positions over those of each prompt: (R, P, ...)."""
        if self.n_prompts == 1:
            return values.sum(1, keepdim=True)
        members = self._keep(("members", partial), values.device, lambda: self._members(partial, values.device))
        return torch.einsum("pa,ra...->rp...", members[:, part].to(values), values)

    def sum_at(self, values: Tensor, packed: np.ndarray) -> Tensor:
        """Sum values (R, A', ...) at ``packed`` positions over those of each prompt: (R, P, ...)."""
        if self.n_prompts == 1:
            return values.sum(1, keepdim=True)
        prompt = np.searchsorted(self.offsets, packed, side="right") - 1
        members = to_device((prompt == np.arange(self.n_prompts)[:, None]).astype(np.uint8), values.device)
        return torch.einsum("pa,ra...->rp...", members.to(values), values)

    def pieces(self, packed: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Cut ``packed`` positions (A,), in order, into pieces of one prompt and of at most 64 positions.

        Returns the ends of the pieces (S + 1,) int32, and which are a prompt's, (P, S); None where each is one prompt.
        """
        key = ("pieces", len(packed), int(packed[0]), int(packed[-1]))
        in_order = len(packed) == packed[-1] - packed[0] + 1
        return self._keep(key, device, lambda: self._cut(packed, device)) if in_order else self._cut(packed, device)

    def _cut(self, packed: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor | None]:
        prompt = np.searchsorted(self.offsets, packed, side="right") - 1
        first = np.searchsorted(prompt, np.arange(self.n_prompts))  # of each prompt
        place = np.arange(len(packed)) - first[prompt]
        begins = np.flatnonzero(place % _PIECE == 0)
        ends = to_device(np.append(begins, len(packed)).astype(np.int32), device)
        if np.array_equal(prompt[begins], np.arange(self.n_prompts)):
            return ends, None
        return ends, to_device((prompt[begins] == np.arange(self.n_prompts)[:, None]).astype(np.uint8), device)

    def range(self, rows: slice, device: torch.device) -> Tensor:
        """The numbers of some neighbouring rows, int64."""
        key = ("range", rows.start, rows.stop)
        return self._keep(key, device, lambda: torch.arange(rows.start, rows.stop, device=device))

    def dot(self, gradients: Tensor, x: Tensor, partial: bool) -> Tensor:
        """Return Σ_n ⟨λ[r, n], x[n]⟩ over the positions of each prompt: (R, A, D) and (A, D) -> (R, P)."""
        if self.n_prompts == 1 and x.device.type != "cpu":  # where that is one sum after the other, and rounds more
            return gradients.flatten(1) @ x.flatten()[:, None]
        return self.sum((gradients * x).sum(-1), partial)

    def _members(self, partial: bool, device: torch.device) -> Tensor:
        packed = self.host_at if partial else np.arange(self.n_positions)
        prompt = np.searchsorted(self.offsets, packed, side="right") - 1
        return to_device((prompt == np.arange(self.n_prompts)[:, None]).astype(np.uint8), device)

    def _batches(self, partial: bool, device: torch.device) -> list[Batch]:
        lengths = np.diff(self.offsets)
        queries = self.reads if partial else [np.arange(n) for n in lengths]
        begins = np.concatenate([[0], np.cumsum([len(at) for at in queries])[:-1]])
        groups = _groups(lengths.tolist())
        return [_batch(group, self.offsets, queries, begins, not partial, device) for group in groups]

    def _keep(self, key: Any, device: torch.device, make: Callable[[], Made]) -> Made:
        if (key, device) not in self._kept:
            self._kept[key, device] = make()
        return self._kept[key, device]


def _groups(lengths: Sequence[int]) -> list[list[int]]:
    """Return the prompts in groups of about equal length, each in order."""
    groups: list[list[int]] = []
    for prompt in sorted(range(len(lengths)), key=lambda p: -lengths[p]):
        longest = lengths[groups[-1][0]] if groups else 0
        if groups and (longest <= _SHORT or lengths[prompt] >= _ALIKE * longest):
            groups[-1].append(prompt)
        else:
            groups.append([prompt])
    return [sorted(group) for group in groups]


def _batch(
    group: list[int],
    offsets: np.ndarray,
    queries: Sequence[np.ndarray],
    begins: np.ndarray,
    causal: bool,
    device: torch.device,
) -> Batch:
    lengths, starts = np.diff(offsets)[group], offsets[group]
    n, q = int(lengths.max()), max(len(queries[p]) for p in group)
    keys = starts[:, None] + np.minimum(np.arange(n), lengths[:, None] - 1)
    counts = np.array([len(queries[p]) for p in group])
    place = np.minimum(np.arange(q), counts[:, None] - 1)
    local = np.stack([queries[p][at] for p, at in zip(group, place, strict=True)])
    slots, padded = begins[group][:, None] + place, np.arange(q) >= counts[:, None]
    in_order = group == list(range(group[0], group[0] + len(group))) and (lengths == n).all()
    filled = None if in_order else np.flatnonzero((np.arange(n) < lengths[:, None]).flatten())
    return Batch(
        prompts=to_device(np.array(group), device),
        keys=to_device(keys, device),
        local=to_device(local, device),
        slots=to_device(slots, device),
        padded=to_device(padded, device) if padded.any() else None,
        filled=None if filled is None else to_device(filled, device),
        packed=None if filled is None else to_device(keys.flatten()[filled], device),
        first=int(starts[0]),
        causal=causal,
    )
