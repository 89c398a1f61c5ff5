"""Subspaces by seed, trained and random: a prompt's shares in them, and the agreement of two of them."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ...adjoint.estimate import spearman
from ...components.custom import Subspaces
from ...components.model import Tokens
from ...engine import DePass
from ...inputs.targets import LogProb
from ...options import RuleName
from ...trace.record import Trace
from ..methods.base import SHAPLEY, SOFTMAX
from ..probes import Classifier
from ..questions import Question
from ..statements import Statements, truthfulness
from ..statistics import pearson, rounded, top_overlap

RANKS = (1, 4)
TRAINED, RANDOM, ACROSS, SIGNED = "trained", "random", "trained and random", "trained, signed"
RULES: tuple[RuleName, ...] = (SOFTMAX, SHAPLEY)
MEASURES = ("spearman", "pearson", "top 3", "top 10 %")

Bases: TypeAlias = dict[str, list[Tensor]]  # orthonormal (D, k) by kind, one of each seed


def kind_of(origin: str, rank: int) -> str:
    """Return the name of a kind of subspaces."""
    return f"{origin}, rank {rank}"


def classifiers(statements: Statements, x: Tensor, learnt: Sequence[int], count: int) -> list[Classifier]:
    """Return ``count`` classifiers of hidden states x (S, D): each learns without the directions of those before it."""
    found: list[Classifier] = []
    left = x
    for _ in range(count):
        found.append(statements.fit(left, learnt))
        basis = orthonormal(torch.stack([truthfulness(one) for one in found], 1)).to(x)
        left = x - x @ basis @ basis.T
    return found


def orthonormal(x: Tensor) -> Tensor:
    """Return an orthonormal basis (D, k) in float64 of what x (D, k) spans; its first vector points along x's first."""
    found, sizes = torch.linalg.qr(x.double())
    return found * sizes.diagonal().sign()


def nearness(a: Tensor, b: Tensor) -> float:
    """Return the root mean square of the cosines of the principal angles of two subspaces (D, k), 0 to 1."""
    return float((a.T @ b).square().sum().div(a.shape[1]).sqrt())


def sample(statements: Statements, name: str) -> tuple[list[int], list[int]]:
    """Draw as many groups of statements as there are, with replacement. Returns those drawn, and those left over."""
    count, draw = len(statements.groups), random.Random(f"bootstrap-{name}")
    drawn = [draw.randrange(count) for _ in range(count)]
    left = set(range(count)) - set(drawn)
    numbers = [[number for group in groups for number in statements.groups[group]] for groups in (drawn, sorted(left))]
    return numbers[0], numbers[1]


def pairs_of(each: Mapping[str, Sequence[Any]]) -> Iterator[tuple[str, list[tuple[Any, Any]]]]:
    """Yield pairs of two seeds' values by name: trained, random, and one of each, by rank."""
    if SIGNED in each:
        yield SIGNED, list(itertools.combinations(each[SIGNED], 2))
    for rank in RANKS:
        trained, chance = (each[kind_of(origin, rank)] for origin in (TRAINED, RANDOM))
        yield kind_of(TRAINED, rank), list(itertools.combinations(trained, 2))
        yield kind_of(RANDOM, rank), list(itertools.combinations(chance, 2))
        yield kind_of(ACROSS, rank), list(itertools.product(trained, chance))


def subspace_shares(
    engine: DePass, trace: Trace, question: Question, bases: Mapping[int, Bases]
) -> dict[int, dict[str, dict[str, list[float | None]]]]:
    """Return the part of each subspace in the answer's log-probability, by layer, rule and kind, one of each seed."""
    layers, target = list(bases), LogProb(question.target)
    ledger = engine.ledger(trace, target, rule=SHAPLEY)
    found: dict[int, dict[str, dict[str, list[float | None]]]] = {
        layer: {rule: {} for rule in RULES} for layer in bases
    }
    for kind, given in bases[layers[0]].items():
        for seed in range(len(given)):
            each = Subspaces(layers=layers, bases={layer: [bases[layer][kind][seed]] for layer in layers})
            results = {
                SOFTMAX: engine.attribute(trace, each, target, method="exact", allocation=SOFTMAX),
                SHAPLEY: ledger.scores(each),
            }
            for rule, result in results.items():
                for layer, one in zip(layers, result.by_layer, strict=True):
                    part = rounded(float(one.scores[0] / one.scores.sum()))
                    found[layer][rule].setdefault(kind, []).append(part)
    return found


def token_scores(
    engine: DePass, trace: Trace, bases: Bases, layer: int, rule: RuleName, special: Tensor
) -> dict[str, list[Tensor]]:
    """Return tokens' shares (N,) in the size of the last position's projection on each subspace, by kind.

    Token m's is ⟨P x, P x[m]⟩ / ‖P x‖, with P x the projection of what enters ``layer``; they sum to ‖P x‖. Those of
    :data:`SIGNED` are the products with a classifier's direction. Those of ``special`` tokens (N,) bool are left out.
    """
    x = trace.resid(layer)[-1].double()
    projected = [basis.to(x) @ (basis.to(x).T @ x) for given in bases.values() for basis in given]
    targets = [(one / one.norm()).float() for one in projected]
    every = engine.attribute(trace, Tokens(), targets, end=layer, allocation=rule).scores[:, : len(special)]
    scores = iter(every[:, ~special].cpu().float())
    found = {kind: [next(scores) for _ in given] for kind, given in bases.items()}
    first = kind_of(TRAINED, 1)
    signs = [torch.sign(basis[:, 0].to(x) @ x).cpu() for basis in bases[first]]
    found[SIGNED] = [sign * one for sign, one in zip(signs, found[first], strict=True)]
    return found


def agreement(scores: Mapping[str, Sequence[Tensor]]) -> dict[str, dict[str, float | None]]:
    """Return the mean of every measure of agreement over the pairs of subspaces of each name."""
    found = {}
    for name, pairs in pairs_of(scores):
        of_measure = zip(*(_measures(pair) for pair in pairs), strict=True)
        found[name] = {measure: rounded(mean_of(each)) for measure, each in zip(MEASURES, of_measure, strict=True)}
    return found


def _measures(pair: tuple[Tensor, Tensor]) -> tuple[float, ...]:
    """Return the figures of :data:`MEASURES` of two score vectors (N,)."""
    a, b = pair
    tenth = max(1, round(len(a) / 10))
    return spearman(a, b), pearson(a, b), top_overlap(a, b, min(3, len(a))), top_overlap(a, b, tenth)


def mean_of(values: Any) -> float:
    """Return the mean of values; None and NaN are none."""
    given = [x for x in values if x is not None and not math.isnan(x)]
    return sum(given) / len(given) if given else math.nan
