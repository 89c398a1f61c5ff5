"""Refinement: chosen components are propagated one by one given log Z, their only error (DESIGN.md section 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from ..runtime.transfer import to_device
from .approximation import Approximation
from .crowd import Crowd, dead_rows
from .forward import Released, Step
from .memory import singles_at_once
from .stack import LayerStack
from .starts import Start


@dataclass(frozen=True)
class SingleScores:
    """Scores (R, K) of the chosen components, and the relative error of Z that a sample of them shows, or None."""

    scores: Tensor
    partition_error: float | None = None


def scores_given_z(
    stack: LayerStack,
    starts: Sequence[Start],
    steps: Sequence[Step],
    chosen: Sequence[Tensor],
    directions: Tensor,
    approximation: Approximation,
    budget: int = 1 << 28,
    released: Mapping[int, Released] | None = None,
    measure: bool = False,
) -> SingleScores:
    """Propagate ``chosen[s]`` (k,) of every start and read them in ``directions`` (K, D): rows in the order of starts.

    In Z a component's own term is that of its mean field; it is replaced by its real one (no share then exceeds 1,
    however loud it is). An ``exact`` log Z is left as it is. Components that were explicit at first (``released``, as
    :class:`.forward.Forward` has them) go on from where they were released.

    ``measure``: the components are a random sample of the crowd, and tell how far Z is off.
    """
    singles = _singles(starts, chosen, released or {})
    width = max((step.crowd.log_z.shape[2] for step in steps), default=1)
    size = singles_at_once(budget, stack.n, width, directions.element_size(), measure)
    scores = directions.new_zeros(len(singles), len(directions))
    error = _PartitionError([len(start.named) for start in starts]) if measure else None
    walk = _SingleWalk(stack, starts, steps, directions, approximation.temperature, error)
    order = sorted(range(len(singles)), key=lambda r: (singles[r].entering, singles[r].start, singles[r].row is None))
    for first in range(0, len(order), size):
        rows = order[first : first + size]
        found = walk.carry([singles[row] for row in rows], len(rows) / len(order))
        scores.index_copy_(0, to_device(torch.tensor(rows, device="cpu"), scores.device), found)
    return SingleScores(scores, None if error is None else error.value())


@dataclass(frozen=True)
class _Single:
    """A component on its way by itself: the layer that it enters, and its row there if it was carried so far."""

    entering: int
    start: int
    member: int
    row: Tensor | None = None


def _singles(starts: Sequence[Start], chosen: Sequence[Tensor], released: Mapping[int, Released]) -> list[_Single]:
    further: dict[tuple[int, int], tuple[int, Tensor]] = {}
    for index, rows in released.items():
        for row, key in enumerate(zip(rows.owner.tolist(), rows.member.tolist(), strict=True)):
            further[key] = (index, rows.x[row])
    found = []
    for s, members in enumerate(chosen):
        for member in members.tolist():
            index, row = further.get((s, member), (starts[s].entering, None))
            found.append(_Single(index, s, member, row))
    return found


@dataclass(frozen=True)
class _SingleWalk:
    """Carries components by themselves through the layers of ``steps``; other fields as of :func:`scores_given_z`."""

    stack: LayerStack
    starts: Sequence[Start]
    steps: Sequence[Step]
    directions: Tensor
    temperature: float
    error: _PartitionError | None

    def carry(self, singles: Sequence[_Single], part: float) -> Tensor:
        """Return scores (R, K) of components in the order of their beginnings, ``part`` of all."""
        x = self.directions.new_zeros(0, self.stack.n, self.directions.shape[1])
        owners = torch.tensor([single.start for single in singles], dtype=torch.long, device="cpu")
        for step in self.steps:
            self.stack.progress.finish(part)
            joining = [single for single in singles if single.entering == step.index]
            if len(x) or joining:
                x = self._pass_layer(step, x, joining, owners)
        late = self._first_rows([single for single in singles if single.entering >= self.stack.end])
        ends = [x[:, -1].to(self.directions.device), *(rows[:, -1].to(self.directions) for rows in late)]
        return torch.cat(ends) @ self.directions.T

    def _pass_layer(self, step: Step, x: Tensor, joining: Sequence[_Single], owners: Tensor) -> Tensor:
        """Return the rows (r, Q, D) behind a layer, with those that enter it."""
        maps = self.stack.maps(step.index)
        new = self._first_rows(joining)
        x = torch.cat([x.to(maps.device), *(rows.to(maps.device, x.dtype) for rows in new)])
        read = x[:, step.queries]
        if any(self.starts[single.start].mid and single.row is None for single in joining):
            x = read
        else:
            x = maps.normed(read + maps.ov(x), "attention")
        owner = to_device(owners[: len(x)], maps.device)
        gated = read if maps.parallel else x
        u, dead = maps.gates(gated).div_(self.temperature), dead_rows(gated)[..., None]
        shares = _shares(u, dead, owner, step.crowd)
        if self.error is not None:
            self.error.add(u, dead, owner, step.crowd)
        return maps.normed(x + maps.down(shares.mul_(maps.act)), "mlp")

    def _first_rows(self, singles: Sequence[_Single]) -> list[Tensor]:
        """Return the rows (k, N, D) of components that begin together, in their order."""
        rows: list[Tensor] = []
        for s, group in groupby(singles, key=lambda single: single.start):
            part = list(group)  # those that were carried already come first
            carried = [single.row for single in part if single.row is not None]
            fresh = [single.member for single in part if single.row is None]
            if carried:
                rows.append(torch.stack(carried))
            if fresh:
                start = self.starts[s]
                rows.append(start.named.rows(to_device(torch.tensor(fresh, device="cpu"), start.bias.device)))
        return rows


def _shares(u: Tensor, dead: Tensor, owner: Tensor, crowd: Crowd) -> Tensor:
    """Return w of rows with gates ``u`` (R, Q, I) in units of T; those that are ``dead`` (R, Q, 1) take none."""
    log_z = crowd.log_z[owner]
    w = (u - log_z).clamp_(max=80.0).exp_()
    w = w.masked_fill_(dead, 0.0)
    if crowd.exact:
        return w.clamp_(max=1.0)
    # Z without its mean field's term, and with its own
    others = (1.0 - crowd.share[owner]).clamp_min_(0.0)
    return w / (others + w).clamp_min_(torch.finfo(w.dtype).tiny)


class _PartitionError:
    """The distance of Σ_m w from 1: the mean of a sample's exact shares less their linearised ones, times their number.

    The product of the means of two halves of the sample is free of the bias that sampling noise would give a square.
    ``counts`` holds the number of components of every start.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self._counts = counts
        self._total: Tensor | None = None
        self._number: Tensor | None = None

    def add(self, u: Tensor, dead: Tensor, owner: Tensor, crowd: Crowd) -> None:
        """Add a layer's: gates ``u`` (R, Q, I) in units of T of components of the starts ``owner`` (R,).

        Those that are ``dead`` (R, Q, 1) take no share.
        """
        off = _linearisation_error(u, dead, owner, crowd)
        starts = len(crowd.log_z)
        halves = torch.zeros(2, starts, *off.shape[1:], dtype=off.dtype, device=off.device)
        drawn = off.new_zeros(2, starts)
        for half in (0, 1):
            mine = owner[half::2]
            halves[half].index_add_(0, mine, off[half::2])
            drawn[half].index_add_(0, mine, torch.ones_like(mine, dtype=off.dtype))
        both = (drawn > 0).all(0)
        counts = torch.tensor(self._counts[:starts], dtype=off.dtype, device="cpu")
        scale = to_device(counts, off.device) / drawn.clamp_min(1.0)
        means = halves * scale[..., None, None]  # zero where there is nobody
        total, number = (means[0] * means[1]).sum(), both.sum() * off.shape[1] * off.shape[2]
        if self._total is None or self._number is None:
            self._total, self._number = total, number
        else:  # the layers before may be on another device
            self._total = self._total + total.to(self._total.device)
            self._number = self._number + number.to(self._number.device)

    def value(self) -> float | None:
        """Return the root mean square over layers, positions and neurons, or None where too few were drawn."""
        if self._total is None or self._number is None or not float(self._number):
            return None
        return float((self._total / self._number).clamp_min(0.0).sqrt())


def _linearisation_error(u: Tensor, dead: Tensor, owner: Tensor, crowd: Crowd) -> Tensor:
    """Return the exact share less the linearised one of each row: (R, Q, I)."""
    slope = crowd.slope.expand_as(crowd.log_z)[owner]
    linear = crowd.share[owner] * (1.0 + slope * (u - crowd.mean[owner]))
    exact = (u - crowd.log_z[owner]).clamp_(max=0.0).exp_().masked_fill_(dead, 0.0)
    return exact - linear
