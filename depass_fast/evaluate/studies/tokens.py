"""The tokens that the answer needs: every method's ranking, put to the test by taking tokens out of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..comparison import cell, compared
from ..erasure import DISRUPT, RECOVER, TENTHS
from ..methods import base
from ..methods.scores import scores_of
from ..questions import LOG_PROB, READS, Question
from ..statistics import mean, rounded
from ..study import Item, QuestionStudy, Row
from ..tables import Panel, Table
from .token_measures import CURVES, ERASER, HIGHER, LDS, measured

ABLATIONS, FEW_ABLATIONS = 32, 8  # random ones, and those of the toy size
PICTURED = (
    base.SOFTMAX,
    base.SHAPLEY,
    base.ATTN_LRP,
    base.INTEGRATED,
    base.GRADIENT_INPUT,
    base.ROLLOUT,
    base.DELETED,
    base.RANDOM,
)
OTHERS = tuple(read for read in READS if read != LOG_PROB)
TABLES = {
    "Tokens deleted": (DISRUPT, RECOVER),
    "Tokens replaced": (f"{DISRUPT}, replaced", f"{RECOVER}, replaced"),
    "ERASER": ("comprehensiveness", "sufficiency"),
    "Deletion, insertion and LDS": ("deletion", "insertion", LDS),
}
NOTE = (
    f"Ranked by the scores in the log-probability; in brackets, where measured: in the {' and in the '.join(OTHERS)}. "
    "An asterisk: the best, or not told from it."
)


class TokenStudy(QuestionStudy):
    """Rank a prompt's tokens by every method, signed, and take them out from the highest down. Special tokens stay.

    *Disrupt* and *recover* are the answer's probability without the highest 10 to 100 % of the tokens, and with these
    alone, the mean over the shares (section 4.1.1 of the paper). Tokens are deleted, as published, or replaced by a
    filler. *Comprehensiveness* and *sufficiency* are ERASER's: the fall of the probability without the highest 1, 5,
    10, 20, 50 %, and with these alone; deleted. *Deletion* and *insertion* are areas under the curve of the probability
    while the highest are replaced one after the other, or put back into a prompt of fillers. *LDS* is the rank
    correlation of a sum of scores, those of the tokens left, with the target that they are of, over random ablations
    that replace each token with probability ½; the log-probability stands for the target of a method that has none.
    """

    name, title = "tokens", "Tokens that the answer needs"
    version = 2

    def measure(self, item: Item) -> Row:
        question: Question = item.value
        scoring: dict[str, Any] = {}
        seed = self.seed_of(question)
        scores = scores_of(self.engine, question, [base.TOKENS], seed=seed, facts=scoring)[base.TOKENS]
        found = measured(self.engine, question, scores, self._ablations, seed)
        return {
            "answer": question.answer,
            "tokens": len(question.ids),
            "probability": rounded(found.probability),
            "forward_passes": found.forward_passes,
            "run_tokens": found.run_tokens,
            "scoring": scoring,
            "figures": found.figures,
            "curves": found.curves,
        }

    @property
    def _ablations(self) -> int:
        return FEW_ABLATIONS if self.settings.quick else ABLATIONS

    def facts(self) -> Row:
        shares = {"shares": list(TENTHS), "eraser_shares": list(ERASER)}
        return {"measures": list(HIGHER), **shares, "ablations": self._ablations}

    def summary(self, rows: Sequence[Row]) -> Row:
        seed = self.settings.seed
        names = _names(rows)
        methods: dict[str, Row] = {method: {read: {} for read in reads} for method, reads in names.items()}
        for number, (measure, higher) in enumerate(HIGHER.items()):
            for read in READS:
                rivals = {method: read if read in reads else base.NO_READ for method, reads in names.items()}
                values = {
                    method: [_value(row, method, own, number) for row in rows]
                    for method, own in rivals.items()
                    if own in names[method]
                }
                for method, found in compared(values, higher, seed).items():
                    if rivals[method] == read or read == LOG_PROB:  # what has no read stands beside the log-probability
                        methods[method][rivals[method]][measure] = found
        means = {
            name: mean([row[name] for row in rows], seed)
            for name in ("probability", "tokens", "forward_passes", "run_tokens")
        }
        return {**means, "complete": _complete(rows), "methods": methods, "curves": _curves(rows, seed)}

    @staticmethod
    def tables(result: Row) -> list[Table]:
        complete = result["summary"]["complete"]
        more = ""
        if complete["of"]:
            more = f" Integrated gradients are complete to 1 % on {complete['prompts']} of {complete['of']} prompts."
        return [
            Table(
                title,
                ["ranked by", *(f"{name} ({'higher' if HIGHER[name] else 'lower'} is better)" for name in measures)],
                [
                    [method, *(_cell(reads, measure) for measure in measures)]
                    for method, reads in result["summary"]["methods"].items()
                ],
                note=NOTE + more,
            )
            for title, measures in TABLES.items()
        ]

    @staticmethod
    def panels(result: Row) -> list[Panel]:
        curves, x = result["summary"]["curves"], [100 * share for share in result["shares"]]
        drawn = [method for method in PICTURED if method in curves]
        texts = {DISRUPT: "the highest are deleted", RECOVER: "the highest alone are kept"}
        return [
            Panel(
                f"{kind}: {texts[kind]}",
                "tokens, %",
                "the answer's probability",
                {method: (x, curves[method][kind]["mean"]) for method in drawn},
                {
                    method: (x, curves[method][kind]["low"], curves[method][kind]["high"])
                    for method in drawn
                    if None not in curves[method][kind]["low"]
                },
            )
            for kind in CURVES
        ]


def _names(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Return the reads of every method, of all that any row has."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        for method, reads in row["figures"].items():
            found.setdefault(method, {}).update(dict.fromkeys(reads))
    return {method: list(reads) for method, reads in found.items()}


def _value(row: Row, method: str, read: str, number: int) -> float | None:
    """Return the figure of a measure, None where the method went without a score or the measure without a figure."""
    figures = row["figures"].get(method, {}).get(read)
    return None if figures is None else figures[number]


def _complete(rows: Sequence[Row]) -> dict[str, int]:
    """Return on how many prompts integrated gradients sum to the change of every target to 1 %, of those that say."""
    errors = [row["scoring"]["completeness"] for row in rows if "completeness" in row["scoring"]]
    return {"prompts": sum(max(each) <= 0.01 for each in errors), "of": len(errors)}


def _curves(rows: Sequence[Row], seed: int) -> Row:
    """Return the mean curve of every method with its interval, over the rows that have it."""
    found: Row = {}
    for method in dict.fromkeys(method for row in rows for method in row["curves"]):
        each = [row["curves"][method] for row in rows if method in row["curves"]]
        found[method] = {}
        for kind in CURVES:
            means = [mean(values, seed) for values in zip(*(one[kind] for one in each), strict=True)]
            found[method][kind] = {
                name: [None if (x := one[name]) is None else rounded(x) for one in means]
                for name in ("mean", "low", "high")
            }
    return found


def _cell(reads: Row, measure: str) -> str:
    """Return a figure by the log-probability with its interval, and in brackets the means by the other reads."""
    if base.NO_READ in reads:
        return cell(reads[base.NO_READ][measure])
    others = [reads[read][measure]["mean"] for read in OTHERS if read in reads]
    more = "" if None in others else f" ({', '.join(f'{x:.3f}' for x in others)})"
    return cell(reads[LOG_PROB][measure]) + more
