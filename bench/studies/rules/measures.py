"""The two measures: answers that survive masked components, and the answer's probability with tokens deleted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from depass_fast import DePass

from ..faithfulness import masked_predictions

PARTS = {"neurons": "down_proj", "heads": "o_proj"}
LOWEST, HIGHEST = "lowest", "highest"
SIGNED, BY_SIZE = "signed", "by size"
SHARES = {  # of all layers' components
    "neurons": {LOWEST: (0.1, 0.2, 0.4, 0.6, 0.8), HIGHEST: (0.0005, 0.001, 0.005, 0.02, 0.1)},
    "heads": {LOWEST: (0.1, 0.2, 0.3, 0.5, 0.7), HIGHEST: (0.02, 0.05, 0.1, 0.2, 0.3)},
}
DELETED = tuple(tenth / 10 for tenth in range(1, 11))  # of a prompt's tokens


def orders(scores: Tensor, both: bool) -> Iterator[tuple[str, Tensor]]:
    """Yield the rankings of scores (L, W), the lowest first: components of all layers, (L·W,). One unless ``both``."""
    if both:
        yield SIGNED, scores.flatten().argsort(stable=True)
    yield BY_SIZE, scores.flatten().abs().argsort(stable=True)


def masked(
    engine: DePass, ids: Tensor, target: int, kind: str, scores: Tensor, both: bool
) -> dict[str, dict[str, str]]:
    """Mask the lowest and the highest shares of a prompt's components, in one batch.

    ``both``: ranked by the signed scores and by their size, else by size alone. Returns {ranking: {end: a digit per
    share}}, 1 where the model still answers ``target``.
    """
    masks, places = [], []
    for ranking, order in orders(scores, both):
        for end, shares in SHARES[kind].items():
            for share in shares:
                count, mask = max(1, round(share * len(order))), torch.zeros(len(order), dtype=torch.bool)
                mask[order[:count] if end == LOWEST else order[-count:]] = True
                masks.append(mask.view(scores.shape))
                places.append((ranking, end))
    right = masked_predictions(engine, ids, torch.stack(masks), PARTS[kind]) == target
    digits: dict[str, dict[str, str]] = {}
    for (ranking, end), one in zip(places, right.tolist(), strict=True):
        of_ranking = digits.setdefault(ranking, {})
        of_ranking[end] = of_ranking.get(end, "") + str(int(one))
    return digits


@torch.no_grad()
def deleted(
    engine: DePass, ids: Tensor, target: int, special: set[int], scores: dict[tuple[str, str], Tensor]
) -> dict[tuple[str, str], dict[str, float]]:
    """Delete a prompt's tokens from the highest score down (disrupt), or all others (recover).

    Returns the answer's probability, its mean over the shares of :data:`DELETED`. Special tokens stay, and one token at
    least.
    """
    free = torch.tensor([number for number, token in enumerate(ids.tolist()) if token not in special])
    stays = torch.tensor([token in special for token in ids.tolist()])
    answers: dict[tuple[int, ...], float] = {}
    kept: dict[tuple[tuple[str, str], str], list[tuple[int, ...]]] = {}
    for method, of_method in scores.items():
        order = free[of_method[free].argsort(descending=True, stable=True)]
        for share in DELETED:
            count = max(1, round(share * len(order)))
            for measure, chosen in (("disrupt", order[count:]), ("recover", order[:count])):
                keep = stays.clone()
                keep[chosen] = True
                if not keep.any():
                    keep[order[-1]] = True
                kept.setdefault((method, measure), []).append(tuple(keep.nonzero().flatten().tolist()))
    by_length: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    for one in {one for each in kept.values() for one in each}:
        by_length[len(one)].append(one)
    for same in by_length.values():
        for chosen, probability in zip(same, _probabilities(engine, ids[torch.tensor(same)], target), strict=True):
            answers[chosen] = probability
    found: dict[tuple[str, str], dict[str, float]] = {}
    for (method, measure), each in kept.items():
        found.setdefault(method, {})[measure] = sum(answers[one] for one in each) / len(each)
    return found


def _probabilities(engine: DePass, ids: Tensor, target: int) -> list[float]:
    """Return P(target) behind every row of ids (B, N)."""
    logits = engine.model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]
    return logits.float().softmax(-1)[:, target].tolist()
