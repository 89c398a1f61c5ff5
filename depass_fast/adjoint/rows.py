"""The explicit rows of a sweep: components that are carried as in an exact run, and the probe of every crowd."""

from __future__ import annotations

from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from ..runtime.transfer import all_to_device, to_device
from .approximation import Approximation
from .loud import Loud
from .starts import Start

REST_ROW, BIAS_ROW, PROBE_ROW = -1, -2, -3


class ExplicitRows:
    """The explicit rows, those of a start together: ``x`` (R, Q, D), ``owner`` and ``member`` (R,).

    Row r is component ``member[r]`` of start ``owner[r]``, or its `rest`, `bias` or probe (``REST_ROW``, ...).
    A row is released behind layer ``until`` (R,), where its expected root mean square of g/T is below its ``limits``
    (R,). ``sizes`` says how many rows a start has. The first of a start's rows is its probe. All but ``x`` is in host
    memory, so that asking for it waits for no device.
    """

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.sizes: list[int] = []
        self.owner = self.member = torch.zeros(0, dtype=torch.long, device="cpu")
        self.limits = torch.zeros(0, device="cpu")
        self.until = torch.zeros(0, dtype=torch.long, device="cpu")
        self._places: dict[int, Tensor] = {}
        self._tables: tuple[Tensor, Tensor, Tensor] | None = None

    def to(self, device: torch.device) -> None:
        if self.x.device != device:
            self.x, self._places, self._tables = self.x.to(device), {}, None

    def places(self, member: int) -> Tensor:
        """Return the rows of all starts that are `rest`, `bias` or the probe: indices (r,), in order, on x's device."""
        if member not in self._places:
            self._places[member] = to_device((self.member == member).nonzero()[:, 0], self.x.device)
        return self._places[member]

    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the first row of every start (S + 1,) int64, and where in it `rest` and `bias` are, on x's device.

        These are (S,) int32, -1 where a start has none.
        """
        if self._tables is None:
            first = np.concatenate([[0], np.cumsum(self.sizes)])
            found = [first, *(np.full(len(self.sizes), -1, np.int32) for _ in range(2))]
            for places, kind in zip(found[1:], (REST_ROW, BIAS_ROW), strict=True):
                at = (self.member == kind).numpy().nonzero()[0]
                owner = self.owner.numpy()[at]
                places[owner] = at - first[owner]
            first, rest, bias = all_to_device(found, self.x.device)
            self._tables = first, rest, bias
        return self._tables

    def named_of(self, start: int) -> Tensor:
        """Return the named components of a start that are explicit: indices (r,) in host memory."""
        return self.member[(self.owner == start) & (self.member >= 0)]

    def join(self, start: Start, explicit: Loud, approximation: Approximation) -> None:
        """Append the rows of the next start: probe, `rest`, `bias`, and the components that are ``explicit``."""
        named = explicit.index
        rows, extras = [_probe(start, named, approximation)[None]], [PROBE_ROW]
        if start.rest is not None:
            rows, extras = [*rows, start.rest[None]], [*extras, REST_ROW]
        if start.has_bias:
            rows, extras = [*rows, start.bias[None]], [*extras, BIAS_ROW]
        if len(named):
            rows.append(start.named.rows(to_device(named, start.bias.device)))
        member = torch.cat([torch.tensor(extras, dtype=torch.long, device="cpu"), named])
        limits = [0.0] * len(extras) + [approximation.quiet] * len(named)
        n = self.x.shape[1]
        self.x = torch.cat([self.x, *(new[:, new.shape[1] - n :].to(self.x) for new in rows)])
        self.owner = torch.cat([self.owner, torch.full_like(member, len(self.sizes))])
        self.member = torch.cat([self.member, member])
        self.limits = torch.cat([self.limits, torch.tensor(limits, device="cpu")])
        extra = explicit.until.new_full((len(extras),), -1)
        self.until = torch.cat([self.until, extra, explicit.until])
        self.sizes.append(len(member))
        self._places, self._tables = {}, None

    def keep(self, kept: Tensor) -> None:
        """Drop the rows that are not ``kept`` (R,) bool."""
        self.x = self.x[to_device(kept.nonzero()[:, 0], self.x.device)]
        self._places, self._tables = {}, None
        self.owner, self.member = self.owner[kept], self.member[kept]
        self.limits, self.until = self.limits[kept], self.until[kept]
        self.sizes = self.owner.bincount(minlength=len(self.sizes)).tolist()

    def by_start(self, values: Tensor) -> list[Tensor]:
        """Return views (s, rows, ...) of ``values`` (R, ...), each of neighbouring starts with equally many rows."""
        runs = [(len(list(same)), size) for size, same in groupby(self.sizes)]
        whole = values.split([starts * size for starts, size in runs])
        return [part.unflatten(0, run) for part, run in zip(whole, runs, strict=True)]


def _probe(start: Start, explicit: Tensor, approximation: Approximation) -> Tensor:
    """Return the crowd with random signs that sum to zero: Σ ε[m] · X[n, m], (N, D). Its square tells its scatter."""
    m = len(start.named)
    if not approximation.scatter or len(explicit) == m:
        return torch.zeros_like(start.bias)
    signs = approximation.signs(m, start.layer).to(start.bias.dtype)
    signs[explicit] = 0.0
    signs -= signs.sum() / (m - len(explicit))
    signs[explicit] = 0.0
    return start.named.sum(to_device(signs, start.bias.device))
