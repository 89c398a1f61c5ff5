"""Measures of a ranking of tokens: disrupt and recover, ERASER's, insertion and deletion, LDS."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...adjoint.estimate import spearman
from ...engine import DePass
from ..erasure import DISRUPT, RECOVER, TENTHS, Ranking, Row, counts_of, erased
from ..interventions import replacement_id, values_after
from ..questions import LOG_PROB, READS, Question
from ..statistics import rounded

ERASER = (0.01, 0.05, 0.1, 0.2, 0.5)  # of a prompt's tokens
CURVES = (DISRUPT, RECOVER)  # measures whose probabilities are kept


class Measure(NamedTuple):
    """A measure: the rows that it runs, and its figure from the answer's probability behind each, and in full.

    ``replaced``: tokens are replaced by a filler, not deleted. ``higher``: a higher figure is better.
    """

    rows: Callable[[Ranking], list[Row]]
    figure: Callable[[Ranking, Sequence[float], float], float]
    replaced: bool
    higher: bool


def average(ranking: Ranking, p: Sequence[float], full: float) -> float:
    """Return the mean of p."""
    return sum(p) / len(p)


def fall(ranking: Ranking, p: Sequence[float], full: float) -> float:
    """Return the mean of p(full) - p: ERASER's area over the perturbation curve, AOPC."""
    return full - sum(p) / len(p)


def area(ranking: Ranking, p: Sequence[float], full: float) -> float:
    """Return the area under p over :func:`steps`, by trapezoids; all tokens are 1."""
    x = torch.tensor(steps(ranking), dtype=torch.float64)
    return float(torch.trapezoid(torch.tensor(p, dtype=torch.float64), x / x[-1]))


def steps(ranking: Ranking) -> list[int]:
    """Return the numbers of tokens at which a curve is measured: none to all, by tenths; up to ten one at a time."""
    return sorted({0, *counts_of(TENTHS, len(ranking.order))})


MEASURES = {
    DISRUPT: Measure(Ranking.disrupted, average, replaced=False, higher=False),
    RECOVER: Measure(Ranking.recovered, average, replaced=False, higher=True),
    f"{DISRUPT}, replaced": Measure(Ranking.disrupted, average, replaced=True, higher=False),
    f"{RECOVER}, replaced": Measure(Ranking.recovered, average, replaced=True, higher=True),
    "comprehensiveness": Measure(lambda r: r.disrupted(ERASER), fall, replaced=False, higher=True),
    "sufficiency": Measure(lambda r: r.recovered(ERASER), fall, replaced=False, higher=False),
    "deletion": Measure(lambda r: [r.without(n) for n in steps(r)], area, replaced=True, higher=False),
    "insertion": Measure(lambda r: [r.only(n) for n in steps(r)], area, replaced=True, higher=True),
}
LDS, LDS_LOG_PROB = "LDS", "LDS in the log-probability"
HIGHER = {name: one.higher for name, one in MEASURES.items()} | {LDS: True, LDS_LOG_PROB: True}


class Measured(NamedTuple):
    """The figures of :data:`HIGHER` by method and read, in its order; None where the measure is not made of that read.

    curves: probabilities of :data:`CURVES` by method, of the scores in the log-probability. probability: the answer's,
    in full. forward_passes, run_tokens: the distinct rows that were run, and the tokens in them.
    """

    figures: dict[str, dict[str, list[float | None]]]
    curves: dict[str, dict[str, list[float | None]]]
    probability: float
    forward_passes: int
    run_tokens: int


def measured(
    engine: DePass, question: Question, scores: Mapping[tuple[str, str], Tensor], ablations: int, seed: int
) -> Measured:
    """Measure the scores (N,) of every method and read. The rows of all of them run together, and equal ones once.

    Scores in the logit and in the contrast are measured by deletion and by LDS, not by replacement: it costs most.
    """
    filler, whole = replacement_id(engine), tuple(question.ids.tolist())
    rankings = {
        (name, measure): Ranking.of(question.ids, question.special, one, filler if made.replaced else None)
        for name, one in scores.items()
        for measure, made in MEASURES.items()
        if target_of(name) == LOG_PROB or not made.replaced
    }
    rows = {key: MEASURES[key[1]].rows(ranking) for key, ranking in rankings.items()}
    kept = drawn(question.special, ablations, seed)
    ablated = [erased(whole, set((~one).nonzero().flatten().tolist()), filler) for one in kept]
    values = values_after(engine, [whole, *ablated, *(row for each in rows.values() for row in each)], question.values)
    p = {row: math.exp(value[READS.index(LOG_PROB)]) for row, value in values.items()}
    effects = torch.tensor([values[row] for row in ablated], dtype=torch.float64)  # (ablations, 3)
    found = Measured({}, {}, p[whole], len(values), sum(map(len, values)))
    for name, one in scores.items():
        method, read = name
        figures = [
            rounded(made.figure(rankings[key], [p[row] for row in rows[key]], p[whole])) if key in rows else None
            for measure, made in MEASURES.items()
            for key in [(name, measure)]
        ]
        figures += [lds(one, kept, effects[:, READS.index(target)]) for target in (target_of(name), LOG_PROB)]
        found.figures.setdefault(method, {})[read] = figures
        if target_of(name) == LOG_PROB:
            found.curves[method] = {kind: [rounded(p[row], 3) for row in rows[name, kind]] for kind in CURVES}
    return found


def target_of(name: tuple[str, str]) -> str:
    """Return the read of (method, read); the log-probability where the method knows of no target."""
    return name[1] if name[1] in READS else LOG_PROB


def drawn(special: Tensor, count: int, seed: int) -> Tensor:
    """Draw what each random ablation keeps: all ``special`` (N,) tokens, others with probability ½; (count, N) bool."""
    draw = torch.Generator().manual_seed(seed)
    return (torch.rand(count, len(special), generator=draw) < 0.5) | special.cpu()


def lds(scores: Tensor, kept: Tensor, effects: Tensor) -> float | None:
    """Return the rank correlation of the ``effects`` (count,) of ablations with the sums of the scores that are kept.

    It is the linear datamodeling score of Park et al. 2023. ``scores`` (N,), ``kept`` (count, N) bool.
    """
    return rounded(spearman(kept.double() @ scores.double(), effects))
