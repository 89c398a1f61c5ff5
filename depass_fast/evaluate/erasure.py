"""Tokens taken out of a prompt, from the highest score down: deleted, or replaced by a filler. Special tokens stay."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ..engine import DePass
from .interventions import log_probs_after

Row: TypeAlias = tuple[int, ...]  # the ids of a prompt

TENTHS = tuple(tenth / 10 for tenth in range(1, 11))  # of a prompt's tokens
DISRUPT, RECOVER = "disrupt", "recover"


def counts_of(shares: Sequence[float], total: int) -> list[int]:
    """Return how many of ``total`` tokens each share of them is: one at least."""
    return [max(1, round(share * total)) for share in shares]


def erased(ids: Row, gone: Collection[int], filler: int | None) -> Row:
    """Return ids without those at the positions ``gone``, or with the filler's id there, if there is one."""
    if filler is None:
        return tuple(token for at, token in enumerate(ids) if at not in gone)
    return tuple(filler if at in gone else token for at, token in enumerate(ids))


@dataclass(frozen=True)
class Ranking:
    """A prompt's ``ids`` (N,), and the positions of the tokens that may go in ``order``, the highest score first.

    Tokens are deleted where there is no ``filler``. Where a whole prompt would be, the last in the order stays.
    """

    ids: Row
    order: Row
    filler: int | None = None

    @classmethod
    def of(cls, ids: Tensor, special: Tensor, scores: Tensor, filler: int | None = None) -> Ranking:
        """Rank the tokens ids (N,) that are not ``special`` (N,) bool by ``scores`` (N,); equal ones keep their order.

        Raises:
            ValueError: all tokens are special.
        """
        free = (~special).nonzero().flatten().cpu()
        if not len(free):
            raise ValueError("prompt: all of its tokens are special, and there is none to take out.")
        order = free[scores.cpu()[free].argsort(descending=True, stable=True)]
        return cls(tuple(ids.tolist()), tuple(order.tolist()), filler)

    def without(self, count: int) -> Row:
        """Return the prompt without the ``count`` highest tokens."""
        return self._erased(self.order[:count])

    def only(self, count: int) -> Row:
        """Return the prompt with the ``count`` highest tokens alone, beside the special ones."""
        return self._erased(self.order[count:])

    def disrupted(self, shares: Sequence[float] = TENTHS) -> list[Row]:
        """Return the prompt without the highest tokens, by share."""
        return [self.without(count) for count in counts_of(shares, len(self.order))]

    def recovered(self, shares: Sequence[float] = TENTHS) -> list[Row]:
        """Return the prompt with the highest tokens alone, by share."""
        return [self.only(count) for count in counts_of(shares, len(self.order))]

    def _erased(self, gone: Row) -> Row:
        return erased(self.ids, set(gone), self.filler) or (self.ids[self.order[-1]],)


def deleted(
    engine: DePass, ids: Tensor, target: int, special: Collection[int], scores: Mapping[tuple[str, str], Tensor]
) -> dict[tuple[str, str], dict[str, float]]:
    """Delete a prompt's tokens from the highest score down (disrupt), or all others (recover), by every method.

    Returns the probability of ``target``, its mean over :data:`TENTHS`. Those of ids (N,) that are in ``special`` stay.
    """
    stays = torch.tensor([token in special for token in ids.tolist()])
    rankings = {method: Ranking.of(ids, stays, each) for method, each in scores.items()}
    rows = {name: {DISRUPT: one.disrupted(), RECOVER: one.recovered()} for name, one in rankings.items()}
    every = [row for of_method in rows.values() for each in of_method.values() for row in each]
    found = log_probs_after(engine, every, target)
    return {
        method: {kind: sum(math.exp(found[row]) for row in each) / len(each) for kind, each in of_method.items()}
        for method, of_method in rows.items()
    }
