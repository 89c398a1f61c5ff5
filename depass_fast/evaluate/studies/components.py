"""Heads and neurons: which of them the answer needs, by every method (section 4.2 of the paper)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..circuits import KEPT, kept_masks
from ..interventions import HEADS, NEURONS, check_maskable, next_logits
from ..masking import HIGHEST, LOWEST, Effect, Ends, effects, end_masks, orders
from ..methods.base import (
    ATTN_LRP,
    GRADIENT,
    HALF,
    NO_READ,
    NORM,
    PUBLISHED_GRADIENT,
    PUBLISHED_NORM,
    RANDOM,
    SHAPLEY,
    SOFTMAX,
    TAYLOR,
    Scores,
)
from ..methods.scores import scores_of
from ..questions import CONTRAST, LOG_PROB, LOGIT, READS, Question
from ..statistics import rounded
from ..study import Item, QuestionStudy, Row
from ..tables import Panel, Table
from . import component_tables as report

MAIN = (SOFTMAX, SHAPLEY, GRADIENT)  # masked by their scores in the logit, too
PUBLISHED = (PUBLISHED_GRADIENT, PUBLISHED_NORM)
COMPARED = (SOFTMAX, SHAPLEY, HALF, TAYLOR, GRADIENT, NORM, RANDOM)
WHERE_POSSIBLE = (ATTN_LRP, *PUBLISHED)  # not in every model
SHARES: Mapping[str, Ends] = {  # fewer than the library's, for the cost: a mask is a forward pass
    HEADS: {LOWEST: (0.1, 0.3, 0.5), HIGHEST: (0.02, 0.1, 0.3)},
    NEURONS: {LOWEST: (0.2, 0.5, 0.8), HIGHEST: (0.001, 0.01, 0.1)},
}
NOTHING, MASKED, KEEPING = "nothing", "masked", "kept"
Place: TypeAlias = tuple[str, ...]  # of figures in a row


class ComponentStudy(QuestionStudy):
    """Masked heads and neurons, and MIB's circuits of them.

    Every method ranks the heads, and the neurons, of all layers by its signed score and by its size; norms and random
    numbers by size alone. What is masked is zero at every position.

    - The lowest and the highest of :data:`SHARES` masked: is the answer still the next token, and how probable is it?
      Ranked by the score in the log-probability; :data:`MAIN` by that in the logit, too.
    - Only the top share kept (:mod:`depass_fast.evaluate.circuits`): CPR and CMD of the logit difference, ranked by the
      score in that difference. The published variants are left out here.

    Rules without neurons of all layers (linear, relu, max) are compared by the study `rules`; one head at a time left
    out takes a forward pass per head, and is left to the study `freezing`. A mixture of experts has no neurons here.
    """

    name, title = "components", "Heads and neurons"

    @property
    def kinds(self) -> tuple[str, ...]:
        try:
            check_maskable(self.engine, NEURONS)
        except ValueError:
            return (HEADS,)
        return (HEADS, NEURONS)

    def facts(self) -> Row:
        shares = {kind: {end: list(some) for end, some in SHARES[kind].items()} for kind in self.kinds}
        return {"kinds": list(self.kinds), "shares": shares, "kept": list(KEPT)}

    def measure(self, item: Item) -> Row:
        question: Question = item.value
        scores, left_out = self._scores(question)
        logits = next_logits(self.engine, question.ids[None])[0]
        values = dict(zip(READS, question.values(logits).tolist(), strict=True))
        row: Row = {
            "prompt": question.prompt,
            "answer": question.answer,
            "tokens": len(question.ids),
            "probability": rounded(np.exp(values[LOG_PROB])),
            "lead": rounded(values[CONTRAST]),
            **({"left_out": left_out} if left_out else {}),
        }
        for kind in self.kinds:
            row[kind] = self._measured(question, kind, scores[kind])
        return row

    def _scores(self, question: Question) -> tuple[dict[str, Scores], dict[str, str]]:
        """Return the scores, and the methods that do not go with this model, each with the reason."""
        given = {"kinds": self.kinds, "seed": self.seed_of(question)}
        found, left_out = scores_of(self.engine, question, only=COMPARED, **given), {}
        for method in WHERE_POSSIBLE:
            try:
                more = scores_of(self.engine, question, only=[method], **given)
            except ValueError as error:
                left_out[method] = str(error)
                continue
            for kind in self.kinds:
                found[kind] |= more[kind]
        return found, left_out

    def _measured(self, question: Question, kind: str, scores: Scores) -> Row:
        """Return what masks of one kind say, each run once."""
        plan = planned(scores, kind)
        shape = next(iter(scores.values())).shape
        masks = [mask.view(shape) for group in plan.values() for mask in group]
        found = iter(effects(self.engine, question, masks, kind))
        row: Row = {NOTHING: 0.0, MASKED: {}, KEEPING: {}}
        for place, group in plan.items():
            made = [next(found) for _ in group]
            if place[0] == MASKED:
                _put(row, place, _survived(made))
            elif place[0] == KEEPING:
                _put(row, place, [rounded(one.lead) for one in made])
            else:
                row[NOTHING] = rounded(made[0].lead)
        return row

    def summary(self, rows: Sequence[Row]) -> Row:
        found = {kind: report.summary(rows, kind, self.settings.seed) for kind in self.kinds}
        left_out = {method: why for row in rows for method, why in row.get("left_out", {}).items()}
        return {**found, **({"left_out": left_out} if left_out else {})}

    @staticmethod
    def tables(result: Row) -> list[Table]:
        return report.tables(result)

    @staticmethod
    def panels(result: Row) -> list[Panel]:
        return report.panels(result)


def planned(scores: Scores, kind: str) -> dict[Place, list[Tensor]]:
    """Return the masks (M,) bool of scores (L, W) of a kind, by the place of their figures in a row."""
    plan: dict[Place, list[Tensor]] = {(NOTHING,): [torch.ones(next(iter(scores.values())).numel(), dtype=torch.bool)]}
    for (method, read), one in scores.items():
        name = report.name_of(method, read)
        for ranking, order in orders(one, both=read != NO_READ):
            if read in (LOG_PROB, NO_READ) or (read == LOGIT and method in MAIN):
                for end, mask in end_masks(order, SHARES[kind]):
                    plan.setdefault((MASKED, name, ranking, end), []).append(mask)
            if read in (CONTRAST, NO_READ) and method not in PUBLISHED:
                plan[KEEPING, name, ranking] = list(kept_masks(order))
    return plan


def _survived(made: Sequence[Effect]) -> list[str | float | None]:
    """Return a digit per share, 1 where the answer is still right, and the mean of its probability."""
    return ["".join(str(int(one.right)) for one in made), rounded(np.mean([one.probability for one in made]).item())]


def _put(row: Row, place: Place, value: object) -> None:
    for name in place[:-1]:
        row = row.setdefault(name, {})
    row[place[-1]] = value
