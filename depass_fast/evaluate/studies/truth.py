"""Tokens that drive a false answer through a subspace of truthfulness, masked (section 4.1.2 of the paper)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

from ..comparison import cell, compared
from ..erasure import Ranking
from ..interventions import replacement_id, values_after
from ..statements import FOLDS, held_out_accuracy, truthfulness
from ..statistics import rounded
from ..study import Item, Row
from ..tables import Panel, Table, figure
from .on_statements import OnStatements
from .truth_questions import INFORMATION, LETTER, OPTIONS, WORDS, WRONG, Encoded, encoded, read_questions
from .truth_scores import ALONE, CLAIM, MEANINGS, METHODS, PROMPT, RANDOM, scores_of, spans_of

SHARES = {CLAIM: (0.05, 0.1, 0.2, 0.5, 1.0), PROMPT: (0.05, 0.1, 0.2)}  # of the tokens that may be masked
SHOWN = {CLAIM: 0.5, PROMPT: 0.2}  # the share of the tables that compare by other figures
SPANS = {LETTER: (CLAIM,), WORDS: (CLAIM, PROMPT)}  # what is masked in which form
DELETED, REPLACED = "deleted", "replaced"
FIRST = "first option"


class Probe(NamedTuple):
    """The classifier of true and false: the direction (D,) of truth, its bias, and the layer whose input it reads."""

    truth: Tensor
    bias: float
    layer: int


class TruthStudy(OnStatements):
    """Questions with misleading information, and what masking its most untruthful tokens does to the answer.

    A question counts as answered rightly where the right answer is more probable than the wrong one, in the first token
    that differs. All questions are measured, in the order of the file, but those with an answer that begins the other.
    """

    name, title = "truth", "A false answer through a subspace of truthfulness"
    version = 2
    answered_only = False
    depths = (0.25, 0.375, 0.5, 0.625, 0.75)

    def items(self) -> Iterator[Item | None]:
        questions = read_questions(self.settings.data)  # faulty files are refused before any work
        _ = self.probe
        for number, asked in enumerate(questions):
            forms = {form: one for form, each in asked.items() if (one := encoded(self.engine, each)) is not None}
            yield Item(str(number), (number, asked, forms)) if len(forms) == len(asked) else None

    def measure(self, item: Item) -> Row:
        number, asked, forms = item.value
        seed = self.settings.seed * 100_003 + number
        measured = {form: self._measured(one, SPANS[form], seed) for form, one in forms.items()}
        return {"option": asked[LETTER].option if LETTER in asked else None, "forms": measured}

    def _measured(self, one: Encoded, spans: Sequence[str], seed: int) -> Row:
        """Return the margins of one form: of its prompts, and of the misleading one with tokens masked."""
        scores, free = scores_of(self.engine, one, *self.probe, seed), spans_of(one)
        ids, rows = one.ids[WRONG], {}
        for span in spans:
            for kind, filler in ((DELETED, None), (REPLACED, self._filler)):
                for method in _methods(span):
                    ranking = Ranking.of(ids, ~free[span], scores[method], filler)
                    rows[span, kind, method] = ranking.disrupted(SHARES[span])
        plain = {name: tuple(given.tolist()) for name, given in one.ids.items()}
        every = [*plain.values(), *(row for each in rows.values() for row in each)]
        margins = values_after(self.engine, every, lambda logits: logits[:, one.right] - logits[:, one.wrong])
        masked: dict[str, Any] = {}
        for (span, kind, method), each in rows.items():
            masked.setdefault(span, {}).setdefault(kind, {})[method] = [rounded(margins[row]) for row in each]
        return {
            "tokens": len(ids),
            "claim_tokens": int(one.claim.sum()),
            "forward_passes": len(margins),
            "margins": {name: rounded(margins[row]) for name, row in plain.items()},
            "masked": masked,
        }

    @cached_property
    def _filler(self) -> int:
        return replacement_id(self.engine)

    @cached_property
    def probe(self) -> Probe:
        """The classifier that learns from all statements, of the layer where held-out ones are told apart best."""
        statements, by_layer = self._statements, self._by_layer
        layer = max(by_layer, key=lambda one: by_layer[one])
        found = statements.fit(self._states[:, list(by_layer).index(layer)], range(len(statements.texts)))
        return Probe(truthfulness(found), float(found.bias[1] - found.bias[0]), layer)

    @cached_property
    def _by_layer(self) -> dict[int, float]:
        states, seed = self._states, self.settings.seed
        return {layer: held_out_accuracy(self._statements, states[:, i], seed) for i, layer in enumerate(self._layers)}

    def facts(self) -> Row:
        """Return the classifier's layer and its accuracy on held-out statements, by layer."""
        return {
            "classifier": {
                "layer": self.probe.layer,
                "accuracy": self._by_layer[self.probe.layer],
                "by_layer": {str(layer): accuracy for layer, accuracy in self._by_layer.items()},
                "statements": len(self._statements.texts),
                "folds": FOLDS,
            },
            "shares": {span: list(shares) for span, shares in SHARES.items()},
        }

    def summary(self, rows: Sequence[Row]) -> Row:
        """Return accuracies and margins by form, those of the methods with their distance from the best of them."""
        options = [row["option"] for row in rows]
        return {
            form: self._of_form([row["forms"][form] for row in rows], options if form == LETTER else None)
            for form in rows[0]["forms"]
        }

    def _of_form(self, rows: Sequence[Row], options: Sequence[str] | None) -> Row:
        masked = {
            span: {
                kind: [
                    {"share": share, **_compared(rows, span, kind, i, self.settings.seed)}
                    for i, share in enumerate(SHARES[span])
                ]
                for kind in kinds
            }
            for span, kinds in rows[0]["masked"].items()
        }
        return {"asked": {name: self._asked(rows, name, options) for name in INFORMATION}, "masked": masked}

    def _asked(self, rows: Sequence[Row], name: str, options: Sequence[str] | None) -> Row:
        margins = [row["margins"][name] for row in rows]
        values: dict[str, list[float | None]] = {"accuracy": [x > 0 for x in margins], "margin": margins}
        if options is not None:
            values[FIRST] = [(x > 0) == (option == OPTIONS[0]) for x, option in zip(margins, options, strict=True)]
        return {measure: compared({name: each}, True, self.settings.seed)[name] for measure, each in values.items()}

    @staticmethod
    def tables(result: Row) -> list[Table]:
        found = [_asked_table(result)]
        for form, summary in result["summary"].items():
            for span, kinds in summary["masked"].items():
                found += [_accuracy_table(summary, form, span, kind) for kind in kinds]
                found.append(_margin_table(summary, form, span))
        return found

    @staticmethod
    def panels(result: Row) -> list[Panel]:
        found = []
        for form, summary in result["summary"].items():
            before = summary["asked"][WRONG]["accuracy"]["mean"]
            for span, kinds in summary["masked"].items():
                steps = kinds[DELETED]
                x = [0.0, *(100 * step["share"] for step in steps)]
                lines = {
                    method: (x, [before, *(step["accuracy"][method]["mean"] for step in steps)])
                    for method in _methods(span)
                }
                title = f"Answer: {form}; tokens of the {span} deleted"
                found.append(Panel(title, "masked tokens, %", "accuracy", lines))
        return found


def _methods(span: str) -> tuple[str, ...]:
    return METHODS if span == CLAIM else tuple(method for method in METHODS if method != ALONE)


def _compared(rows: Sequence[Row], span: str, kind: str, at: int, seed: int) -> Mapping[str, Any]:
    """Return what masking one share does by every method: to all questions, and to those that were answered falsely."""
    margins = {method: [row["masked"][span][kind][method][at] for row in rows] for method in _methods(span)}
    misled = [row["margins"][WRONG] <= 0 for row in rows]
    right = {method: [float(x > 0) for x in each] for method, each in margins.items()}
    parts = {
        part: {
            method: [x if one == part_is else math.nan for x, one in zip(each, misled, strict=True)]
            for method, each in right.items()
        }
        for part, part_is in (("corrected", True), ("kept", False))
    }
    values = {"accuracy": right, "margin": margins, **parts}
    return {measure: compared(each, True, seed) for measure, each in values.items()}


def _asked_table(result: Row) -> Table:
    probe = result["classifier"]
    by_layer = ", ".join(f"{layer}: {accuracy:.1%}" for layer, accuracy in probe["by_layer"].items())
    measures = ("accuracy", "margin", FIRST)
    rows = [
        [form, name, *(figure(each[measure]) if measure in each else "-" for measure in measures)]
        for form, summary in result["summary"].items()
        for name, each in summary["asked"].items()
    ]
    return Table(
        "Questions by the information that their prompt gives",
        ["answer", "information", *measures],
        rows,
        left=2,
        note=(
            "Margin: log-probability of the right answer less that of the wrong one, in the first token that differs. "
            f"First option: the part of the questions for which A is more probable than B. The classifier of "
            f"{probe['statements']} statements reads the input of layer {probe['layer']}; accuracy on held-out ones by "
            f"layer: {by_layer}."
        ),
    )


def _accuracy_table(summary: Row, form: str, span: str, kind: str) -> Table:
    steps = summary["masked"][span][kind]
    before = figure(summary["asked"][WRONG]["accuracy"])
    return Table(
        f"Accuracy with tokens of the {span} {kind}, answer: {form}",
        ["method", *(f"{step['share']:.0%}" for step in steps)],
        [[method, *(cell(step["accuracy"][method]) for step in steps)] for method in _methods(span)],
        note=(
            f"By the share of its tokens, one at least: those that speak the most for the false answer. {before} "
            "before. *: the best, or not told from it."
        ),
    )


def _margin_table(summary: Row, form: str, span: str) -> Table:
    measures = ("margin", "corrected", "kept")
    steps = {
        kind: next(step for step in each if step["share"] == SHOWN[span])
        for kind, each in summary["masked"][span].items()
    }
    meanings = "; ".join(f"{name}: {meaning}" for name, meaning in MEANINGS.items() if name in _methods(span))
    return Table(
        f"Tokens of the {span} masked, {SHOWN[span]:.0%}, answer: {form}",
        ["method", *(f"{measure}, {kind}" for kind in steps for measure in measures)],
        [
            [method, *(cell(step[measure][method]) for step in steps.values() for measure in measures)]
            for method in _methods(span)
        ],
        note=(
            "Corrected: answered rightly now, of the questions that were answered falsely. Kept: still answered "
            f"rightly, of the others. Methods: {meanings}; {RANDOM}: one order drawn for a prompt."
        ),
    )
