"""The statistics of a part of the components on every rank, made those of all: two reductions where components compete.

What is exchanged are numbers per position and neuron, whatever the number of components: for the softmax and for `max`
two, for `linear` three, for `relu` one. Linear rules exchange nothing.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..allocation import inverse
from .statistics import Statistics

_NOT_A_NUMBER = -2.0  # in place of a winner, where a gate is NaN; nobody is -1


class Reduction(Protocol):
    """The reductions over all ranks, number by number. The largest and the smallest may pass over NaN."""

    def sum(self, part: Tensor, /) -> Tensor: ...

    def max(self, part: Tensor, /) -> Tensor: ...

    def min(self, part: Tensor, /) -> Tensor: ...


def merge(statistics: Statistics, over: Reduction) -> None:
    """Make the statistics of this rank's components those of all ranks' components, in place.

    NaN stays: where a gate is NaN all shares will be NaN, as where one process has all components.
    """
    _MERGES[statistics.rule](statistics, over)
    if not statistics.has_rest:  # else nobody asks how many are alive
        statistics.alive.copy_(over.sum(statistics.alive))


def _softmax(statistics: Statistics, over: Reduction) -> None:
    """The largest gate of all, and the sums brought to it. A sum that is NaN says so to all."""
    t, per_t = statistics.tables, inverse(statistics.temperature, statistics.tables["top"].dtype)
    top = over.max(torch.where(t["top"].isnan(), torch.inf, t["top"]))
    finite = top.masked_fill(top == -torch.inf, 0.0)
    t["sum"].mul_(t["top"].sub_(finite).mul_(per_t).exp_())
    t["sum"].copy_(over.sum(t["sum"]))
    t["top"].copy_(top)


def _linear(statistics: Statistics, over: Reduction) -> None:
    """The smallest gate of all, and the sums of what lies above it. A sum that is NaN says so to all."""
    t = statistics.tables
    low = over.min(torch.where(t["low"].isnan(), -torch.inf, t["low"]))
    t["sum"].add_(t["count"] * torch.where(t["count"] > 0, t["low"].sub_(low), 0.0))
    for name in ("sum", "count"):
        t[name].copy_(over.sum(t[name]))
    t["low"].copy_(low)


def _relu(statistics: Statistics, over: Reduction) -> None:
    table = statistics.tables["sum"]
    table.copy_(over.sum(table))


def _winner(statistics: Statistics, over: Reduction) -> None:
    """The largest gate of all, and the first of those who have it. NaN goes in place of the winner."""
    t = statistics.tables
    wrong = t["top"].isnan()
    top = over.max(torch.where(wrong, torch.inf, t["top"]))
    winner = torch.where(t["top"] == top, t["winner"], torch.inf)
    winner = over.min(winner.masked_fill_(wrong, _NOT_A_NUMBER))
    t["top"].copy_(top.masked_fill_(winner == _NOT_A_NUMBER, torch.nan))
    t["winner"].copy_(winner)


_MERGES = {"softmax": _softmax, "linear": _linear, "relu": _relu, "max": _winner}
