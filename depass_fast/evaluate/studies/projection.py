"""The agreement of shares over classifiers of several seeds, and over random subspaces: how robust is a projection?"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch

from ...adjoint.estimate import spearman
from ..comparison import compared
from ..methods.base import SOFTMAX
from ..probes import Classifier
from ..questions import Question
from ..statements import truthfulness
from ..statistics import rounded
from ..study import Item, QuestionStudy, Row
from ..tables import Panel, Table, figure
from .on_statements import OnStatements
from .projection_scores import (
    MEASURES,
    RANDOM,
    RANKS,
    RULES,
    SIGNED,
    TRAINED,
    Bases,
    agreement,
    classifiers,
    kind_of,
    mean_of,
    nearness,
    orthonormal,
    pairs_of,
    sample,
    subspace_shares,
    token_scores,
)

SEEDS, QUICK_SEEDS = 5, 2


class ProjectionStudy(OnStatements, QuestionStudy):
    """Shares of a subspace in the answer, and of tokens in that subspace, over several classifiers of one property.

    Classifiers differ in the statements that they learn from, a bootstrap sample by seed: they are fits of a convex
    function, which does not depend on initial values. Of rank 1 it is a classifier's direction. Of rank 4 it is the
    span of four: each learns from what the ones before it leave over.
    """

    name, title = "projection", "Robustness of the projection on a subspace"
    task = "facts"
    depths = (0.25, 0.5, 0.75)

    def items(self) -> Iterator[Item | None]:
        _ = self._bases  # a faulty file of statements is refused before any question is asked
        yield from super().items()

    def measure(self, item: Item) -> Row:
        question: Question = item.value
        trace = self.engine.trace(question.ids)
        shares = subspace_shares(self.engine, trace, question, self._bases)
        return {
            "tokens": len(question.ids),
            "layers": {
                str(layer): {
                    "shares": shares[layer],
                    "agreement": {
                        rule: agreement(token_scores(self.engine, trace, bases, layer, rule, question.special))
                        for rule in RULES
                    },
                }
                for layer, bases in self._bases.items()
            },
        }

    @cached_property
    def _samples(self) -> list[tuple[list[int], list[int]]]:
        """The statements that a seed's classifiers learn from, and those that are left over."""
        seeds = range(QUICK_SEEDS if self.settings.quick else SEEDS)
        return [sample(self._statements, f"{self.settings.seed}-{seed}") for seed in seeds]

    @cached_property
    def _classifiers(self) -> dict[int, list[list[Classifier]]]:
        """The classifiers of every seed by layer: as many as the largest rank, one after the other."""
        return {
            layer: [
                classifiers(self._statements, self._states[:, i], learnt, max(RANKS)) for learnt, _ in self._samples
            ]
            for i, layer in enumerate(self._layers)
        }

    @cached_property
    def _bases(self) -> dict[int, Bases]:
        found = {}
        for layer, of_seed in self._classifiers.items():
            draws, made = torch.Generator().manual_seed(self.settings.seed * 1009 + layer), {}
            for rank in RANKS:
                trained = [torch.stack([truthfulness(one) for one in each[:rank]], 1) for each in of_seed]
                made[kind_of(TRAINED, rank)] = [orthonormal(one) for one in trained]
                made[kind_of(RANDOM, rank)] = [orthonormal(torch.randn(one.shape, generator=draws)) for one in trained]
            found[layer] = made
        return found

    def facts(self) -> Row:
        """Return the accuracy of the classifiers on statements that they have not seen, and the subspaces' cosines."""
        statements, states = self._statements, dict(zip(self._layers, self._states.unbind(1), strict=True))
        return {
            "accuracy_by_layer": {
                str(layer): [
                    rounded(statements.accuracy(each[0], states[layer], left))
                    for each, (_, left) in zip(of_seed, self._samples, strict=True)
                ]
                for layer, of_seed in self._classifiers.items()
            },
            "statements": len(statements.texts),
            "seeds": len(self._samples),
            "cosines": {
                str(layer): {
                    name: rounded(mean_of(nearness(a, b) for a, b in pairs)) for name, pairs in pairs_of(bases)
                }
                for layer, bases in self._bases.items()
            },
        }

    def summary(self, rows: Sequence[Row]) -> Row:
        """Return means over prompts: of shares and of their spread over seeds, and of every measure of agreement."""
        return {"layers": {layer: self._of_layer(rows, layer) for layer in rows[0]["layers"]}}

    def _of_layer(self, rows: Sequence[Row], layer: str) -> Row:
        every, first = [row["layers"][layer] for row in rows], rows[0]["layers"][layer]

        def over(values: Sequence[float | None]) -> Any:
            return _without_best(compared({"": values}, True, self.settings.seed)[""])

        return {
            "shares": {
                rule: {
                    kind: {
                        "mean": over([mean_of(one["shares"][rule][kind]) for one in every]),
                        "spread": over([_spread(one["shares"][rule][kind]) for one in every]),
                        "over_prompts": _over_prompts([one["shares"][rule][kind] for one in every]),
                    }
                    for kind in kinds
                }
                for rule, kinds in first["shares"].items()
            },
            "agreement": {
                rule: {
                    pair: {name: over([one["agreement"][rule][pair][name] for one in every]) for name in MEASURES}
                    for pair in pairs
                }
                for rule, pairs in first["agreement"].items()
            },
        }

    @staticmethod
    def tables(result: Row) -> list[Table]:
        return [_agreement_table(result, rule) for rule in RULES] + [_share_table(result)]

    @staticmethod
    def panels(result: Row) -> list[Panel]:
        layers = result["summary"]["layers"]
        x = [int(layer) for layer in layers]
        found = []
        for rule in RULES:
            pairs = next(iter(layers.values()))["agreement"][rule]
            curves = {pair: [one["agreement"][rule][pair]["spearman"] for one in layers.values()] for pair in pairs}
            lines = {pair: (x, [one["mean"] for one in curve]) for pair, curve in curves.items()}
            bands = {
                pair: (x, [one["low"] for one in curve], [one["high"] for one in curve])
                for pair, curve in curves.items()
                if all(one["low"] is not None for one in curve)
            }
            found.append(Panel(f"Tokens' scores, {rule}", "layer", "Spearman over pairs of subspaces", lines, bands))
        return found


def _spread(values: Sequence[float | None]) -> float:
    """Return the standard deviation over seeds."""
    given = torch.tensor([x for x in values if x is not None], dtype=torch.double)
    return float(given.std()) if len(given) > 1 else math.nan


def _over_prompts(values: Sequence[Sequence[float | None]]) -> float | None:
    """Return the mean Spearman correlation over prompts of two seeds' shares, None for fewer than three prompts."""
    whole = torch.tensor([x for x in values if None not in x], dtype=torch.double)
    if len(whole) < 3:
        return None
    return rounded(mean_of(spearman(a, b) for a, b in itertools.combinations(whole.T, 2)))


def _without_best(found: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name != "from_best"}


def _agreement_table(result: Row, rule: str) -> Table:
    layers = result["summary"]["layers"]
    rows = [
        [layer, pair, *(figure(one[name]) for name in MEASURES), _cosine(result, layer, pair)]
        for layer, each in layers.items()
        for pair, one in each["agreement"][rule].items()
    ]
    return Table(
        f"Agreement of tokens' scores in two subspaces, {rule}",
        ["layer", "pairs", *MEASURES, "cosine"],
        rows,
        left=2,
        note=(
            f"Means over the pairs of {result['seeds']} seeds. Scores: shares in the size of the projection; signed: "
            "in the classifier's logit. Special tokens are left out. Top: the part of the largest tokens by size that "
            "both have. Cosine: the root mean square of those of the principal angles."
        ),
    )


def _cosine(result: Row, layer: str, pair: str) -> str:
    return f"{result['cosines'][layer][kind_of(TRAINED, 1) if pair == SIGNED else pair]:.3f}"


def _share_table(result: Row) -> Table:
    accuracies = ", ".join(f"{layer}: {mean_of(values):.1%}" for layer, values in result["accuracy_by_layer"].items())
    rows = [
        [
            layer, kind,
            *(
                cell
                for rule in RULES
                for one in [each["shares"][rule][kind]]
                for cell in (
                    figure(one["mean"]), figure(one["spread"]),
                    "-" if one["over_prompts"] is None else f"{one['over_prompts']:.2f}",
                )
            ),
        ]
        for layer, each in result["summary"]["layers"].items()
        for kind in each["shares"][SOFTMAX]
    ]  # fmt: skip
    return Table(
        "Share of a subspace in the answer's log-probability",
        ["layer", "subspace", *(f"{name}, {rule}" for rule in RULES for name in ("share", "spread", "over prompts"))],
        rows,
        left=2,
        note=(
            "Spread: standard deviation over seeds. Over prompts: Spearman correlation of two seeds' shares. The "
            f"classifiers' accuracy on statements that they have not seen, by layer: {accuracies}."
        ),
    )
