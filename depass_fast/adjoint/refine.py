"""Components propagated one by one given log Z: exact but for log Z itself (DESIGN.md section 2, *Independence*)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from ..runtime.transfer import to_device
from .forward import Settings, Step
from .maps import LayerStack
from .memory import journeys_at_once
from .starts import Start


@dataclass
class Given:
    """Scores (R, K) of the chosen components, and ``drift``: the relative error of Z that they hint at, or None."""

    scores: Tensor
    drift: float | None = None


def scores_given_z(
    road: LayerStack,
    starts: Sequence[Start],
    steps: Sequence[Step],
    chosen: Sequence[Tensor],
    directions: Tensor,
    settings: Settings,
    budget: int = 1 << 28,
    released: dict[int, tuple[Tensor, Tensor, Tensor]] | None = None,
    measure: bool = False,
) -> Given:
    """Propagate ``chosen[s]`` (k,) of every start and read them in ``directions`` (K, D): rows in the order of starts.

    In Z a component's own term is its mean field's; it is replaced by its real one (no share then exceeds 1, however
    loud it is). Where ``steps`` hold an exact log Z, with a ``share`` of None, Z is left as it is. Components that
    were explicit at first (``released``, as :class:`Forward` has them) go on from where they were released.

    ``measure``: the components are a random sample of the crowd, to be told how far Z is off.
    """
    journeys = _journeys(starts, chosen, released or {})
    width = max((step.log_z.shape[2] for step in steps), default=1)
    size = journeys_at_once(budget, road.n, width, directions.element_size(), measure)
    scores = directions.new_zeros(sum(map(len, chosen)), len(directions))
    drift = _Drift() if measure else None
    order = sorted(
        range(len(journeys)), key=lambda r: (journeys[r].entering, journeys[r].start, journeys[r].row is None)
    )
    for first in range(0, len(order), size):
        rows = order[first : first + size]
        walk = ([journeys[row] for row in rows], starts, steps, directions, settings, drift, len(rows) / len(order))
        scores.index_copy_(0, to_device(torch.tensor(rows, device="cpu"), scores.device), _walk(road, *walk))
    return Given(scores, None if drift is None else drift.value())


@dataclass(frozen=True)
class _Journey:
    """One component on its way: the layer that it enters, and its row there where it was carried so far already."""

    entering: int
    start: int
    member: int
    row: Tensor | None = None


def _journeys(
    starts: Sequence[Start], chosen: Sequence[Tensor], released: dict[int, tuple[Tensor, Tensor, Tensor]]
) -> list[_Journey]:
    further = {}
    for index, (x, owner, member) in released.items():
        for row, key in enumerate(zip(owner.tolist(), member.tolist(), strict=True)):
            further[key] = (index, x[row])
    found = []
    for s, members in enumerate(chosen):
        for member in members.tolist():
            index, row = further.get((s, member), (starts[s].entering, None))
            found.append(_Journey(index, s, member, row))
    return found


def _first_rows(starts: Sequence[Start], journeys: Sequence[_Journey]) -> list[Tensor]:
    """The rows (k, N, D) of journeys that begin together, in their order."""
    rows: list[Tensor] = []
    for s, fresh in groupby(journeys, key=lambda journey: (journey.start, journey.row is None)):
        part = list(fresh)
        if s[1]:
            members = torch.tensor([journey.member for journey in part], device="cpu")
            rows.append(starts[s[0]].named.rows(to_device(members, starts[s[0]].bias.device)))
        else:
            rows.append(torch.stack([journey.row for journey in part]))
    return rows


def _walk(
    road: LayerStack,
    journeys: Sequence[_Journey],
    starts: Sequence[Start],
    steps: Sequence[Step],
    directions: Tensor,
    settings: Settings,
    drift: _Drift | None,
    part: float,
) -> Tensor:
    """Scores (R, K) of journeys in the order of their beginnings, ``part`` of all."""
    x = directions.new_zeros(0, road.n, directions.shape[1])
    owners = torch.tensor([journey.start for journey in journeys], dtype=torch.long, device="cpu")
    for step in steps:
        road.passed.finish(part)
        joining = [journey for journey in journeys if journey.entering == step.index]
        if not len(x) and not joining:
            continue
        maps = road.maps(step.index)
        new = _first_rows(starts, joining)
        x = torch.cat([x.to(maps.device), *(rows.to(maps.device, x.dtype) for rows in new)])
        read = x[:, step.queries]
        if any(starts[journey.start].mid and journey.row is None for journey in joining):
            x = read
        else:
            x = maps.normed(read + maps.ov(x), "attention")
        owner = to_device(owners[: len(x)], maps.device)
        u = maps.gates(read if maps.parallel else x).div_(settings.temperature)
        shares = _shares(u, owner, step)
        if drift is not None:
            drift.add(u, owner, step, [len(starts[s].named) for s in range(len(step.log_z))])
        x = maps.normed(x + maps.down(shares.mul_(maps.act)), "mlp")
    late = _first_rows(starts, [journey for journey in journeys if journey.entering >= road.end])
    x = torch.cat([x[:, -1].to(directions.device), *(rows[:, -1].to(directions) for rows in late)])
    return x @ directions.T


def _shares(u: Tensor, owner: Tensor, step: Step) -> Tensor:
    """w of rows with gates ``u`` (R, Q, I) in units of T; a gate of exactly zero takes none."""
    log_z = step.log_z[owner]
    w = (u - log_z).clamp_(max=80.0).exp_()
    w = w.masked_fill_(u == 0, 0.0)
    if step.share is None:
        return w.clamp_(max=1.0)
    # Z without its mean field's term, and with its own
    others = (1.0 - step.share[owner]).clamp_min_(0.0)
    return w / (others + w).clamp_min_(torch.finfo(w.dtype).tiny)


class _Drift:
    """How far Σ_m w is from 1: the mean of a sample's exact shares less their linearised ones, times their number.

    The product of the means of two halves of the sample is free of the bias that sampling noise would give a square.
    """

    def __init__(self) -> None:
        self._total, self._count = 0.0, 0

    def add(self, u: Tensor, owner: Tensor, step: Step, counts: Sequence[int]) -> None:
        mean, slope, share = (t.expand_as(step.log_z)[owner] for t in (step.mean, step.slope, step.share))
        exact = (u - step.log_z[owner]).clamp_(max=0.0).exp_().masked_fill_(u == 0, 0.0)
        off = exact - share * (1.0 + slope * (u - mean))
        halves = torch.zeros(2, len(step.log_z), *off.shape[1:], dtype=off.dtype, device=off.device)
        numbers = off.new_zeros(2, len(step.log_z))
        for half in (0, 1):
            mine = owner[half::2]
            halves[half].index_add_(0, mine, off[half::2])
            numbers[half].index_add_(0, mine, torch.ones_like(mine, dtype=off.dtype))
        both = (numbers > 0).all(0)
        scale = to_device(torch.tensor(counts, dtype=off.dtype, device="cpu"), off.device) / numbers.clamp_min(1.0)
        means = halves * scale[..., None, None]  # zero where there is nobody
        total, count = (means[0] * means[1]).sum(), both.sum() * off.shape[1] * off.shape[2]
        if isinstance(self._total, Tensor):  # of the layers before, which may be on another device
            total, count = total.to(self._total.device), count.to(self._total.device)
        self._total, self._count = self._total + total, self._count + count

    def value(self) -> float | None:
        if not float(self._count):
            return None
        return float((self._total / self._count).clamp_min(0.0).sqrt())
