"""The lowest and the highest shares of all layers' components masked, and what the model says then."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..engine import DePass
from .interventions import HEADS, NEURONS, masked_logits
from .questions import CONTRAST, LOG_PROB, READS, Question

LOWEST, HIGHEST = "lowest", "highest"
SIGNED, BY_SIZE = "signed", "by size"
RANKINGS = (SIGNED, BY_SIZE)
Ends: TypeAlias = Mapping[str, Sequence[float]]  # shares of all layers' components, by the end that is masked
SHARES: Mapping[str, Ends] = {
    NEURONS: {LOWEST: (0.1, 0.2, 0.4, 0.6, 0.8), HIGHEST: (0.0005, 0.001, 0.005, 0.02, 0.1)},
    HEADS: {LOWEST: (0.1, 0.2, 0.3, 0.5, 0.7), HIGHEST: (0.02, 0.05, 0.1, 0.2, 0.3)},
}
_AT_ONCE = 64  # masks whose logits (V,) are held together


class Effect(NamedTuple):
    """The model under a mask: whether it still answers the target, with which probability, and its lead.

    ``lead`` is the logit difference, target minus foil.
    """

    right: bool
    probability: float
    lead: float


def orders(scores: Tensor, both: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield the rankings of scores (L, W), the lowest first: components of all layers, (L·W,). One unless ``both``."""
    if both:
        yield SIGNED, scores.flatten().argsort(stable=True)
    yield BY_SIZE, scores.flatten().abs().argsort(stable=True)


def end_masks(order: Tensor, ends: Ends) -> Iterator[tuple[str, Tensor]]:
    """Yield (end, mask) for every share of ``ends``; ``order`` (M,), the lowest first; mask (M,) bool.

    A share has one component at least.
    """
    for end, shares in ends.items():
        for share in shares:
            count, mask = max(1, round(share * len(order))), torch.zeros(len(order), dtype=torch.bool)
            mask[order[:count] if end == LOWEST else order[-count:]] = True
            yield end, mask


def masked(
    engine: DePass, ids: Tensor, target: int, kind: str, scores: Tensor, both: bool
) -> dict[str, dict[str, str]]:
    """Mask the lowest and the highest :data:`SHARES` of a prompt's components of a ``kind``; ids (N,).

    ``both``: ranked by the signed scores (L, W) and by their size, else by size alone. Returns {ranking: {end: a digit
    per share}}, 1 where the model still answers ``target``.
    """
    masks, places = [], []
    for ranking, order in orders(scores, both):
        for end, mask in end_masks(order, SHARES[kind]):
            masks.append(mask.view(scores.shape))
            places.append((ranking, end))
    right = masked_logits(engine, ids, torch.stack(masks), kind).argmax(-1) == target
    digits: dict[str, dict[str, str]] = {}
    for (ranking, end), one in zip(places, right.tolist(), strict=True):
        of_ranking = digits.setdefault(ranking, {})
        of_ranking[end] = of_ranking.get(end, "") + str(int(one))
    return digits


def effects(engine: DePass, question: Question, masks: Sequence[Tensor], kind: str) -> list[Effect]:
    """Return what the model says under each of ``masks`` (L, W) bool of a ``kind``. Equal masks run once.

    Raises:
        ValueError: ``kind`` is "neurons", and the model is a mixture of experts.
    """
    keys = [mask.numpy().tobytes() for mask in masks]
    distinct = dict(zip(keys, masks, strict=True))
    found: list[Effect] = []
    for first in range(0, len(distinct), _AT_ONCE):
        part = torch.stack(list(distinct.values())[first : first + _AT_ONCE])
        logits = masked_logits(engine, question.ids, part, kind)
        right = logits.argmax(-1) == question.target
        values = question.values(logits)
        probability, lead = values[:, READS.index(LOG_PROB)].exp(), values[:, READS.index(CONTRAST)]
        found += map(Effect, right.tolist(), probability.tolist(), lead.tolist())
    by_key = dict(zip(distinct, found, strict=True))
    return [by_key[key] for key in keys]
