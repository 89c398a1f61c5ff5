"""The statistics of parts, merged, give the shares that all components together have, in every corner."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from depass_fast.allocation import RULES, Gates
from depass_fast.backends.merge import merge
from depass_fast.backends.statistics import GateBlock, Statistics

N, M, NEURONS = 5, 7, 6
ALL, EVERYWHERE = slice(0, N), slice(0, NEURONS)


class Meeting:
    """The reductions of several threads, each of which has its part. The largest passes over NaN, as gloo's may."""

    def __init__(self, size: int) -> None:
        self._parts, self._barrier = {}, Barrier(size)

    def of(self, rank: int):
        meeting = self

        class Over:
            def sum(self, part):
                return meeting._meet(rank, part).sum(0)

            def max(self, part):
                parts = meeting._meet(rank, part)
                return parts.masked_fill(parts.isnan(), -torch.inf).amax(0)

            def min(self, part):
                parts = meeting._meet(rank, part)
                return parts.masked_fill(parts.isnan(), torch.inf).amin(0)

        return Over()

    def _meet(self, rank: int, part: torch.Tensor) -> torch.Tensor:
        self._parts[rank] = part.clone()
        self._barrier.wait(10)
        parts = torch.stack([self._parts[i] for i in sorted(self._parts)])
        self._barrier.wait(10)
        return parts


def gates(case: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gates (N, M, I) of a corner, who is alive, and who is excluded (N, M)."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(N, M, NEURONS, generator=generator, dtype=torch.float64)
    alive, excluded = torch.ones(N, M, dtype=torch.bool), torch.zeros(N, M, dtype=torch.bool)
    if case == "nobody":
        excluded[1], alive[2, 1:] = True, False
        excluded[2, 0] = True
        alive[3] = False
    elif case == "ties":
        values = values.round()
    elif case == "level":
        values[:] = 0.25
    elif case == "negative":
        values = -values.abs()
    elif case == "no number":
        values[1, 4], values[2, 0, 3], values[3, 6, 2] = torch.nan, torch.nan, torch.nan
        alive[1, :4], alive[1, 5:] = False, False  # nobody but a gate that is none
    elif case == "infinite":
        values[1, 3, 2], values[2, 5, 1] = torch.inf, -torch.inf
    elif case == "one alive":
        alive[:, 1:] = False
    return values, alive, excluded


def expected(rule: str, temperature: float, rest: int | None, case: str) -> torch.Tensor:
    values, alive, excluded = gates(case)
    total, positions = values.sum(1), torch.arange(N)
    return RULES[rule](Gates(values, total, alive, excluded, positions, rest), temperature)


def of_parts(rule: str, temperature: float, rest: int | None, case: str, size: int) -> torch.Tensor:
    """The shares by parts: component m is the rank's with the number m mod ``size``."""
    (values, alive, excluded), meeting, shares = gates(case), Meeting(size), torch.full((N, M, NEURONS), -9.0)
    shares = shares.double()

    def work(rank: int) -> None:
        own = torch.tensor(range(rank, M, size), dtype=torch.int64)
        like = values.new_zeros(N, NEURONS)
        statistics = Statistics.fresh(rule, temperature, rest is not None, like)
        place = (own == rest).nonzero().flatten().tolist() if rest is not None else []
        block = GateBlock(values[:, own], alive[:, own], excluded[:, own], own, place[0] if place else None)
        if len(own):
            statistics.alive.add_(block.alive.sum(1))
            statistics.meet(block, ALL, EVERYWHERE)
        merge(statistics, meeting.of(rank))
        if len(own):
            shares[:, own] = statistics.shares(block, ALL, EVERYWHERE)

    with ThreadPoolExecutor(size) as pool:
        for done in [pool.submit(work, rank) for rank in range(size)]:
            done.result(20)
    return shares


@pytest.mark.parametrize("size", [1, 2, 3, 9])  # of nine ranks two have nothing
@pytest.mark.parametrize("rest", [None, 0])
@pytest.mark.parametrize("case", ["usual", "nobody", "ties", "level", "negative", "no number", "infinite", "one alive"])
@pytest.mark.parametrize("rule", RULES)
def test_shares_are_those_of_all_together(rule, case, rest, size):
    _, alive, excluded = gates(case)
    takes_part = (alive & ~excluded)[..., None]
    for temperature in (0.1, 1e-300):
        wanted, found = expected(rule, temperature, rest, case), of_parts(rule, temperature, rest, case, size)
        wrong = wanted.isnan()
        assert torch.equal(found.isnan(), wrong & takes_part)
        assert torch.allclose(found[~wrong], wanted[~wrong], atol=1e-12)
