"""The explicit rows of a sweep: components that are carried as in an exact run, and the probe of every crowd."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from ..runtime.transfer import all_to_device, to_device
from .approximation import Approximation
from .loud import Loud
from .starts import Start

REST_ROW, BIAS_ROW, PROBE_ROW = -1, -2, -3


@dataclass(frozen=True)
class _Tables:
    """The places of the rows of all starts, on the rows' device.

    ``first`` (S + 1,) int64 is the first row of every start, ``within`` has the place of `rest` and `bias` in a start,
    (S,) int32, -1 where there is none, ``places`` the rows (r,) int64 of all starts that are of a kind, ``hosts`` the
    same in host memory. ``crowd`` (S,) is the number of a start's components that are not explicit, in the rows' dtype.
    """

    first: Tensor
    within: dict[int, Tensor]
    places: dict[int, Tensor]
    hosts: dict[int, np.ndarray]
    crowd: Tensor


class ExplicitRows:
    """The explicit rows, those of a start together: ``x`` (R, Q, D), ``owner`` and ``member`` (R,).

    Row r is component ``member[r]`` of start ``owner[r]``, or its `rest`, `bias` or probe (``REST_ROW``, ...).
    A row is released behind layer ``until`` (R,), where its expected root mean square of g/T is below its ``limits``
    (R,). ``sizes`` says how many rows a start has. The first of a start's rows is its probe. All but ``x`` is in host
    memory, so that asking for it waits for no device.

    The starts that are still to join are known from the beginning, and are behind the others in every table. So the
    tables that a device needs are sent there once for all layers, and again only when rows are released.
    """

    def __init__(
        self, x: Tensor, starts: Sequence[Start], explicit: Sequence[Loud], approximation: Approximation
    ) -> None:
        """Begin with no rows: ``x`` is (0, N, D); ``explicit`` are the components of every start that are carried."""
        self.x, self._starts, self._joined = x, starts, 0
        members, until = [_NONE], [_NONE]
        for start, chosen in zip(starts, explicit, strict=True):
            kinds = [PROBE_ROW] + [REST_ROW] * (start.rest is not None) + [BIAS_ROW] * start.has_bias
            members.append(torch.cat([torch.tensor(kinds, dtype=torch.long, device="cpu"), chosen.index]))
            until.append(torch.cat([chosen.until.new_full((len(kinds),), -1), chosen.until]))
        self._sizes = [len(member) for member in members[1:]]
        self._owner = torch.arange(len(starts), device="cpu").repeat_interleave(
            torch.tensor(self._sizes, dtype=torch.long, device="cpu")
        )
        self._member, self._until = torch.cat(members), torch.cat(until)
        self._signs = _sent([_signs(*pair, approximation) for pair in zip(starts, explicit, strict=True)], x.device)
        self._named = _sent([chosen.index for chosen in explicit], x.device)
        self._quiet, self._tables = approximation.quiet, None

    @property
    def owner(self) -> Tensor:
        return self._owner[: len(self.x)]

    @property
    def member(self) -> Tensor:
        return self._member[: len(self.x)]

    @property
    def until(self) -> Tensor:
        return self._until[: len(self.x)]

    @property
    def limits(self) -> Tensor:
        return (self.member >= 0) * self._quiet

    @property
    def sizes(self) -> list[int]:
        return self._sizes[: self._joined]

    def to(self, device: torch.device) -> None:
        if self.x.device != device:
            self.x, self._tables = self.x.to(device), None

    def places(self, member: int) -> Tensor:
        """Return the rows of all starts that are `rest`, `bias` or the probe: indices (r,), in order, on x's device."""
        tables = self._on_device()
        return tables.places[member][: int(np.searchsorted(tables.hosts[member], len(self.x)))]

    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the first row of every start (S + 1,) int64, and where in it `rest` and `bias` are, on x's device.

        These are (S,) int32, -1 where a start has none.
        """
        tables, s = self._on_device(), self._joined
        return tables.first[: s + 1], tables.within[REST_ROW][:s], tables.within[BIAS_ROW][:s]

    def crowds(self) -> Tensor:
        """Return how many named components of every start are not explicit: (S,) in x's dtype, on its device."""
        return self._on_device().crowd[: self._joined]

    def _on_device(self) -> _Tables:
        """Return the tables of all starts, those to come among them."""
        if self._tables is None:
            first = np.concatenate([[0], np.cumsum(self._sizes)])
            owner, member = self._owner.numpy(), self._member.numpy()
            hosts = {kind: (member == kind).nonzero()[0] for kind in (REST_ROW, BIAS_ROW, PROBE_ROW)}
            within = {kind: np.full(len(self._sizes), -1, np.int32) for kind in (REST_ROW, BIAS_ROW)}
            for kind, places in within.items():
                places[owner[hosts[kind]]] = hosts[kind] - first[owner[hosts[kind]]]
            explicit = np.bincount(owner[member >= 0], minlength=len(self._sizes))
            crowd = np.array([len(start.named) for start in self._starts]) - explicit
            found = all_to_device([first, crowd, *within.values(), *hosts.values()], self.x.device)
            self._tables = _Tables(
                first=found[0],
                within=dict(zip(within, found[2:4], strict=True)),
                places=dict(zip(hosts, found[4:], strict=True)),
                hosts=hosts,
                crowd=found[1].to(self.x.dtype),
            )
        return self._tables

    def named_of(self, start: int) -> Tensor:
        """Return the named components of a start that are explicit: indices (r,) in host memory."""
        return self.member[(self.owner == start) & (self.member >= 0)]

    def join(self) -> None:
        """Append the rows of the next start: probe, `rest`, `bias`, and the components that are explicit."""
        s, n = self._joined, self.x.shape[1]
        start, signs, named = self._starts[s], self._signs[s], self._named[s]
        probe = start.named.sum(signs.to(start.bias.device)) if len(signs) else torch.zeros_like(start.bias)
        rows = [probe[None]]
        if start.rest is not None:
            rows.append(start.rest[None])
        if start.has_bias:
            rows.append(start.bias[None])
        if len(named):
            rows.append(start.named.rows(named.to(start.bias.device)))
        self.x = torch.cat([self.x, *(new[:, new.shape[1] - n :].to(self.x) for new in rows)])
        self._joined += 1

    def add_to_bias(self, values: Tensor, constant: Tensor | None) -> None:
        """Add a constant (C,) or (Q, C), if there is one, to the rows of `bias` in ``values`` (R, Q, C), in place."""
        if constant is not None:
            at = self.places(BIAS_ROW)
            values.index_add_(0, at, constant.expand(len(at), *values.shape[1:]))

    def keep(self, kept: Tensor) -> None:
        """Drop the rows that are not ``kept`` (R,) bool."""
        self.x = self.x[to_device(kept.nonzero()[:, 0], self.x.device)]
        stay = torch.cat([kept, kept.new_ones(len(self._owner) - len(kept))])
        self._owner, self._member, self._until = self._owner[stay], self._member[stay], self._until[stay]
        self._sizes, self._tables = self._owner.bincount(minlength=len(self._sizes)).tolist(), None

    def by_start(self, values: Tensor) -> list[Tensor]:
        """Return views (s, rows, ...) of ``values`` (R, ...), each of neighbouring starts with equally many rows."""
        runs = [(len(list(same)), size) for size, same in groupby(self.sizes)]
        whole = values.split([starts * size for starts, size in runs])
        return [part.unflatten(0, run) for part, run in zip(whole, runs, strict=True)]


_NONE = torch.zeros(0, dtype=torch.long, device="cpu")


def _sent(parts: Sequence[Tensor], device: torch.device) -> Sequence[Tensor]:
    """Copy vectors of the host to a device, all at once."""
    return to_device(torch.cat(list(parts)), device).split([len(part) for part in parts]) if parts else []


def _signs(start: Start, explicit: Loud, approximation: Approximation) -> Tensor:
    """Return random signs (M,) that sum to zero over the crowd, and are zero elsewhere; empty where none are needed.

    With them the crowd's states are added up to its probe, Σ ε[m] · X[n, m], whose square tells its scatter.
    """
    m, named = len(start.named), explicit.index
    if not approximation.scatter or len(named) == m:
        return _NONE.to(start.bias.dtype)
    signs = approximation.signs(m, start.layer).to(start.bias.dtype)
    signs[named] = 0.0
    signs -= signs.sum() / (m - len(named))
    signs[named] = 0.0
    return signs
