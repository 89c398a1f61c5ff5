"""Study `attention`: whether the explanation of a head's looking predicts what the head really does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...adjoint.estimate import spearman
from ...components.base import Entry
from ...components.model import Tokens
from ...ledger.attribute import way_back
from ...ledger.pages import Wanted
from ...ledger.reads import Reads
from ...ledger.steering import Steers
from ...looking.steer import Outlook, steer
from ...looking.without import TAKEN_OUT
from ...request import make_request, with_targets, with_trace
from .. import qk_circuits
from ..frozen import check_freezable
from ..head_case import BOOK, CARRIED, FIRST, GRADIENT, KEY_LOG_P, LOGIT, NORM, NORMS, HeadCase
from ..interventions import HEADS, graded_logits, readers
from ..methods.gradients import inputs_and_gradients
from ..questions import CONTRAST, READS, Question
from ..statistics import mean, pearson, rounded
from ..study import Item, QuestionStudy, Row, Settings
from ..tables import Panel, Table, figure

N_HEADS = 3  # of a prompt: those whose looking changes the read most
MEASURES = (KEY_LOG_P, LOGIT)
CORRELATIONS = {"Spearman": spearman, "Pearson": pearson}
METHODS = {KEY_LOG_P: (BOOK, GRADIENT, NORM), LOGIT: (BOOK, FIRST, GRADIENT, CARRIED, NORM)}
FIGURES = tuple(
    f"{measure}, {norms}, {side}, {method}, {name}"
    for measure in MEASURES
    for norms in NORMS
    for side in TAKEN_OUT
    for method in METHODS[measure]
    for name in CORRELATIONS
)


class AttentionStudy(QuestionStudy):
    """The predictions of attention's book, against what a head really does when a token is taken out of its input.

    Of every prompt the three heads are looked at whose looking changes the logit difference of the answer and the most
    probable other token most. Each token's part of the head's input, carried there under the shapley rule, is taken out
    of what its queries read, of what its keys read, or of both, at all positions. The head then looks elsewhere; norms
    in front of it react to what is left, as in the model, or are held. Measured are the fall of the log-probability of
    the key that the last position looks at most, and the fall of the logit difference, in a forward pass in which this
    head looks so.

    ``this book``: the shares of that side, for the logit by the path from even attention. ``AttnLRP's split``: gradient
    × logit through the softmax, split over both sides with norms frozen, under the half rule. ``gradient × input``:
    gradients of everything, through norms and softmax. ``carried share``: the token's score as DePass has it. ``norm``:
    the size of its part of the head's input.
    """

    name = "attention"
    title = "Attention's own book"

    def __init__(self, engine: Any, settings: Settings) -> None:
        super().__init__(engine, settings)
        check_freezable(engine)

    @torch.no_grad()
    def measure(self, item: Item) -> Row:
        question: Question = item.value
        outlooks = {rule: self._outlooks(question, rule) for rule in ("shapley", "half")}
        carried = self.engine.attribute(question.ids, Tokens(), question.targets[READS.index(CONTRAST)]).scores
        gradients = self._head_gradients(question)
        trace, row = self.engine.trace(question.ids), {"tokens": len(question.ids), "heads": []}
        for layer, head in self._leading(outlooks["shapley"]):
            state = self.engine.decompose(trace, Tokens(), end=layer, allocation="shapley")
            parts = state.dense()[:, : len(question.ids)].transpose(0, 1)  # (M, N, D)
            case = HeadCase(trace.layers[layer].attention.resid.to(parts), parts, outlooks["shapley"][layer], head)
            predicted = case.predictions(outlooks["half"][layer], gradients[layer][:, head], carried[: len(parts)])
            actual = case.actual(self.engine, question, trace, layer)
            figures = {
                f"{measure}, {norms}, {side}, {method}, {name}": correlate(found, actual[measure, norms, side])
                for (measure, side, method), found in predicted.items()
                for norms in NORMS
                for name, correlate in CORRELATIONS.items()
            }
            row["heads"].append(
                {"head": f"L{layer}H{head}", "figures": [rounded(figures[name], 4) for name in FIGURES]}
            )
        return row

    def _outlooks(self, question: Question, rule: str) -> dict[int, Outlook]:
        """Return what the heads of every layer are worth to the logit difference, under a linear rule."""
        engine = self.engine
        settings = engine.options.updated({"allocation": rule, "progress": False})  # pyright: ignore[reportArgumentType]
        request = make_request(engine.adapter, engine.tokenizer, settings, question.ids, Tokens(), encoded=True)
        request = with_trace(with_targets(request, question.targets[READS.index(CONTRAST)]))
        layers = range(engine.adapter.n_layers)
        steers = Steers.of(engine.adapter, request.require_trace(), request.prompts, layers, keeps=True)
        wanted = Wanted(frozenset(), frozenset(), frozenset(), Entry(0, "resid_pre"))
        way_back(request, Reads.of(request), wanted, steers)
        return {layer: kept[0] for layer, kept in steers.kept.items()}

    def _leading(self, outlooks: dict[int, Outlook]) -> list[tuple[int, int]]:
        """Return the layers and heads whose looking changes the read most."""
        changes = torch.stack([steer(outlooks[layer]).change[0] for layer in sorted(outlooks)]).abs()  # (L, H)
        order = changes.flatten().argsort(descending=True)[:N_HEADS].tolist()
        return [divmod(at, changes.shape[1]) for at in order]

    def _head_gradients(self, question: Question) -> list[Tensor]:
        """Return the model's own gradients of the logit difference at every head's output, (N, H, d) of each layer."""
        modules, at = readers(self.engine, HEADS), READS.index(CONTRAST)

        def read() -> list[Tensor]:
            return [question.values(graded_logits(self.engine, question.ids[None])[0])[at]]

        _, (found,) = inputs_and_gradients(modules, read)
        heads = [self.engine.adapter.attention(index).n_heads for index in range(self.engine.adapter.n_layers)]
        return [one.float().unflatten(-1, (count, -1)) for one, count in zip(found, heads, strict=True)]

    def summary(self, rows: Sequence[Row]) -> Row:
        return {
            name: self._mean([_average([head["figures"][i] for head in row["heads"]]) for row in rows])
            for i, name in enumerate(FIGURES)
        }

    def _mean(self, values: Sequence[float]) -> Row:
        found = mean(values, self.settings.seed)
        return {name: rounded(x) if isinstance(x, float) else x for name, x in found.items()}

    def facts(self) -> Row:
        with torch.no_grad():
            found = qk_circuits.shares(*qk_circuits.build())
        circuits = {name: {key: rounded(x, 5) for key, x in row.items()} for name, row in found.items()}
        return {"figures": FIGURES, "circuits": circuits}

    @staticmethod
    def tables(result: Row) -> list[Table]:
        each = [_agreement(result["summary"], measure, norms) for measure in MEASURES for norms in NORMS]
        return [_known(result["circuits"]), *each]

    @staticmethod
    def panels(result: Row) -> list[Panel]:
        return [_panel(result["summary"], norms) for norms in NORMS]


def _panel(summary: Row, norms: str) -> Panel:
    """Return the agreement of every method with the fall of the leading key's log-probability, side by side."""
    lines, bands = {}, {}
    for method in METHODS[KEY_LOG_P]:
        each = [summary[f"{KEY_LOG_P}, {norms}, {side}, {method}, Spearman"] for side in TAKEN_OUT]
        x = list(range(len(each)))
        middle, low, high = ([math.nan if one[k] is None else one[k] for one in each] for k in ("mean", "low", "high"))
        lines[method], bands[method] = (x, middle), (x, low, high)
    sides = ", ".join(f"{i}: {side}" for i, side in enumerate(TAKEN_OUT))
    return Panel(f"The fall of the {KEY_LOG_P}, {norms}", f"taken out ({sides})", "Spearman", lines, bands)


def _average(values: Sequence[float | None]) -> float:
    """Return the mean of what is there; NaN for nothing."""
    given = [value for value in values if value is not None]
    return sum(given) / len(given) if given else math.nan


def _known(circuits: Row) -> Table:
    header = ["head", "P of its key", "query's side", "key's side"]
    rows = [
        [name, *(f"{row[key]:.4f}" for key in ("probability", "query_side", "key_side"))]
        for name, row in circuits.items()
    ]
    note = "Heads built by hand: the part of the credit for a key that the components get which are meant to."
    return Table("Heads whose reason is known", header, rows, note=note)


def _agreement(summary: Row, measure: str, norms: str) -> Table:
    header = ["method", *(f"{side}, {name}" for side in TAKEN_OUT for name in ("Spearman", "Pearson"))]
    rows = [
        [
            method,
            *(
                figure(summary[f"{measure}, {norms}, {side}, {method}, {name}"])
                for side in TAKEN_OUT
                for name in ("Spearman", "Pearson")
            ),
        ]
        for method in METHODS[measure]
    ]
    note = "Correlations over the tokens of a prompt with what happens when one is taken out of that side of the head."
    return Table(f"The fall of the {measure}, {norms}", header, rows, note=note)
