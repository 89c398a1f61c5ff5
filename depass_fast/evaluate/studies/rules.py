"""Every rule of sharing, and the softmax at several temperatures, put to the test by tokens, heads and neurons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...engine import DePass
from ...linear_rules import LINEAR_RULES
from ...options import RuleName
from ..comparison import cell, compared
from ..erasure import DISRUPT, RECOVER, TENTHS, deleted
from ..interventions import HEADS, NEURONS, check_maskable
from ..masking import BY_SIZE, HIGHEST, LOWEST, RANKINGS, SHARES, SIGNED, effects, end_masks, orders
from ..methods import base
from ..methods.shares import shares
from ..questions import LOG_PROB, READS, Question
from ..statistics import rounded
from ..study import Item, QuestionStudy, Row
from ..tables import Panel, Table

TEMPERATURES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
FEW_TEMPERATURES = (0.03, 0.1, 1.0)  # those of the toy size
NEURONS_EVERY = 2  # prompts: a sweep of all neurons at a low temperature takes a minute
OTHERS = tuple(read for read in READS if read != LOG_PROB)
HIGHER = {f"{kind}, {read}": kind == RECOVER for kind in (DISRUPT, RECOVER) for read in READS} | {
    f"{kind}, {end}, {ranking}": end == LOWEST
    for kind in (HEADS, NEURONS)
    for end in (LOWEST, HIGHEST)
    for ranking in RANKINGS
}
MAIN = {
    "disrupt ↓": f"{DISRUPT}, {LOG_PROB}",
    "recover ↑": f"{RECOVER}, {LOG_PROB}",
    "heads, lowest ↑": f"{HEADS}, {LOWEST}, {SIGNED}",
    "heads, highest ↓": f"{HEADS}, {HIGHEST}, {SIGNED}",
    "neurons, lowest ↑": f"{NEURONS}, {LOWEST}, {SIGNED}",
    "neurons, highest ↓": f"{NEURONS}, {HIGHEST}, {SIGNED}",
}


@dataclass(frozen=True)
class Variant:
    """A rule, and its temperature where it has one."""

    rule: RuleName
    temperature: float | None = None

    @property
    def name(self) -> str:
        return self.rule if self.temperature is None else f"{self.rule}, T = {self.temperature:g}"

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of components that it scores: neurons of all layers need a sweep or a ledger."""
        every = self.rule == base.SOFTMAX or self.rule in LINEAR_RULES
        return base.KINDS if every else (base.TOKENS, HEADS)


def variants(temperatures: Sequence[float]) -> list[Variant]:
    """Return every rule, the softmax at each of the temperatures: no other rule has one."""
    others = (base.LINEAR, base.RELU, base.MAX, *LINEAR_RULES)
    return [*(Variant(base.SOFTMAX, one) for one in temperatures), *map(Variant, others)]


class RuleStudy(QuestionStudy):
    """Rank tokens, heads and neurons under every rule, and under the softmax at temperatures 0.01 to 10.

    Tokens are deleted, as in the study of tokens: the answer's probability without the highest (disrupt), and with
    these alone (recover). Of heads and neurons of all layers the lowest and the highest shares are masked, zero at
    every position: the figure is the part of the masks under which the model still answers rightly. They are ranked by
    the scores in the log-probability, signed and by size. Scores are exact, but for the softmax's neurons, which are
    those of the refined adjoint sweep. Neurons are ranked on the prompts whose number is even, as a sweep at a low
    temperature takes a minute. `linear`, `relu` and `max` have no sweep.
    """

    name, title = "rules", "Is softmax the best rule?"

    def measure(self, item: Item) -> Row:
        question: Question = item.value
        trace, kinds, quick = self.engine.trace(question.ids), self._kinds(question), self.settings.quick
        scores: dict[str, base.Found] = {}
        for variant in variants(FEW_TEMPERATURES if quick else TEMPERATURES):
            wanted = [kind for kind in kinds if kind in variant.kinds]
            subject = base.Subject(self.engine, question, trace, wanted, (variant.rule,))
            scores[variant.name] = shares(subject, variant.rule, variant.temperature)
        found: dict[str, Row] = {name: {} for name in scores}
        tokens = {(name, read): one for name, each in scores.items() for (_, read), one in each[base.TOKENS].items()}
        special = set(question.ids[question.special].tolist())
        for (name, read), figures in deleted(self.engine, question.ids, question.target, special, tokens).items():
            found[name] |= {f"{kind}, {read}": rounded(value) for kind, value in figures.items()}
        for kind in kinds[1:]:
            ranked = {name: each[kind] for name, each in scores.items() if kind in each}
            for name, figures in masked(self.engine, question, kind, ranked).items():
                found[name] |= figures
        figures = {name: [one.get(measure) for measure in HIGHER] for name, one in found.items()}
        return {"answer": question.answer, "tokens": len(question.ids), "figures": figures}

    def _kinds(self, question: Question) -> list[str]:
        """Return the kinds of components that are ranked for a question."""
        asked = self.settings.quick or question.number % NEURONS_EVERY == 0
        return [base.TOKENS, HEADS, *([NEURONS] if asked and self._why_no_neurons() is None else [])]

    def _why_no_neurons(self) -> str | None:
        """Return why the neurons of this model are not ranked, None where they are."""
        try:
            check_maskable(self.engine, NEURONS)
        except ValueError as error:
            return str(error)
        return None

    def facts(self) -> Row:
        return {
            "measures": list(HIGHER),
            "shares": {"tokens": TENTHS, **{kind: dict(ends) for kind, ends in SHARES.items()}},
            "no_neurons": self._why_no_neurons(),
        }

    def summary(self, rows: Sequence[Row]) -> Row:
        names = list(rows[0]["figures"])
        found: Row = {name: {} for name in names}
        for number, (measure, higher) in enumerate(HIGHER.items()):
            values = {name: [_value(row["figures"][name][number]) for row in rows] for name in names}
            for name, one in compared(values, higher, self.settings.seed).items():
                found[name][measure] = one
        return found

    @staticmethod
    def tables(result: Row) -> list[Table]:
        found = result["summary"]
        count = max(one[MAIN["neurons, lowest ↑"]]["n"] for one in found.values())
        note = (
            "Scores in the log-probability, signed. Arrows: higher or lower is better. An asterisk: the best, or not "
            f"told from it. Neurons: on {count} prompts."
        )
        if result["no_neurons"]:
            note = f"{note} {result['no_neurons']}"
        rows = [[name, *(cell(one[measure]) for measure in MAIN.values())] for name, one in found.items()]
        more = [[name, *_others(one)] for name, one in found.items()]
        header = ["rule", *(name.replace(", ", " ") for name in MAIN)]
        return [
            Table("Rules and temperatures", ["rule", *MAIN], rows, note=note),
            Table(
                "The same in other reads and by size",
                header,
                more,
                note=f"Tokens: ranked in the {' / in the '.join(OTHERS)}. Heads and neurons: ranked by size.",
            ),
        ]

    @staticmethod
    def panels(result: Row) -> list[Panel]:
        softmax = {
            float(name.rpartition("= ")[2]): one
            for name, one in result["summary"].items()
            if name.startswith(f"{base.SOFTMAX}, T")
        }
        return [
            _panel(title, y, {name: MAIN[name] for name in names}, softmax, result["summary"][base.SHAPLEY])
            for title, y, names in (
                ("Tokens deleted", "the answer's probability", ["disrupt ↓", "recover ↑"]),
                ("Heads masked", "accuracy", ["heads, lowest ↑", "heads, highest ↓"]),
                ("Neurons masked", "accuracy", ["neurons, lowest ↑", "neurons, highest ↓"]),
            )
            if all(one[MAIN[names[0]]]["mean"] is not None for one in softmax.values())
        ]


def masked(engine: DePass, question: Question, kind: str, scores: dict[str, base.Scores]) -> dict[str, Row]:
    """Mask the lowest and the highest shares of the components of a ``kind``, ranked in the log-probability.

    ``scores`` are those of every variant, {(rule, read): (L, W)}. Returns a digit per share, 1 where the model still
    answers rightly, by variant and by the end and ranking. Equal masks run once.
    """
    masks, places = [], []
    for name, each in scores.items():
        one = next(one for (_, read), one in each.items() if read == LOG_PROB)
        for ranking, order in orders(one, both=True):
            for end, mask in end_masks(order, SHARES[kind]):
                masks.append(mask.view(one.shape))
                places.append((name, f"{kind}, {end}, {ranking}"))
    found: dict[str, Row] = {name: {} for name in scores}
    for (name, measure), effect in zip(places, effects(engine, question, masks, kind), strict=True):
        found[name][measure] = found[name].get(measure, "") + str(int(effect.right))
    return found


def _value(figure: float | str | None) -> float | None:
    """Return a figure of a row, the mean of the digits where it is some."""
    return sum(map(int, figure)) / len(figure) if isinstance(figure, str) else figure


def _others(found: Row) -> list[str]:
    """Return the means of a variant by the other reads, and by size."""
    tokens = [" / ".join(_mean(found[f"{kind}, {read}"]) for read in OTHERS) for kind in (DISRUPT, RECOVER)]
    return tokens + [cell(found[f"{kind}, {end}, {BY_SIZE}"]) for kind in (HEADS, NEURONS) for end in (LOWEST, HIGHEST)]


def _mean(found: Row) -> str:
    return "-" if found["mean"] is None else f"{found['mean']:.3f}"


def _panel(title: str, y: str, measures: dict[str, str], softmax: dict[float, Row], shapley: Row) -> Panel:
    """Return the softmax's figures over its temperature, and shapley's, which has none, as a level."""
    x = sorted(softmax)
    lines = {f"softmax, {name}": (x, [softmax[t][key]["mean"] for t in x]) for name, key in measures.items()}
    lines |= {f"shapley, {name}": (x, [shapley[key]["mean"]] * len(x)) for name, key in measures.items()}
    bands = {
        f"softmax, {name}": (x, [softmax[t][key]["low"] for t in x], [softmax[t][key]["high"] for t in x])
        for name, key in measures.items()
        if softmax[x[0]][key]["low"] is not None
    }
    return Panel(title, "temperature of the softmax", y, lines, bands, log_x=True)
