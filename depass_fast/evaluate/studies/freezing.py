"""Study `freezing`: what holding attention costs. Effects of leaving components out, split into two parts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...adjoint.estimate import spearman
from .. import synthetic
from ..frozen import check_freezable
from ..interventions import HEADS, NEURONS
from ..left_out import REPLACED, ZEROED, Effects, drawn_heads, drawn_neurons, effects
from ..methods.base import SHAPLEY, SOFTMAX, TOKENS
from ..methods.norms import neuron_norms
from ..methods.scores import scores_of
from ..questions import CONTRAST, LOG_PROB, READS, Question
from ..statistics import mean, pearson, rounded
from ..study import Item, QuestionStudy, Row, Settings
from ..tables import Panel, Table, figure

DRAWN_HEADS, DRAWN_NEURONS = 30, 16  # of a prompt
SHOWN = (CONTRAST, LOG_PROB)
SHARES_OF = {REPLACED: TOKENS, ZEROED: TOKENS, HEADS: HEADS, NEURONS: NEURONS}
RULES = {TOKENS: (SOFTMAX, SHAPLEY), HEADS: (SOFTMAX, SHAPLEY), NEURONS: (SHAPLEY,)}
TOTAL, FROZEN, ATTENTION = "total", "frozen", "attention"
PARTS = (TOTAL, FROZEN, ATTENTION)
EXPLAINED = "explained"
PAIRS = (f"{FROZEN} ~ {TOTAL}", *(f"{rule} ~ {part}" for rule in (SOFTMAX, SHAPLEY) for part in (FROZEN, TOTAL)))
SIZES = (*PARTS, *(f"{rule} {what}" for rule in (SOFTMAX, SHAPLEY) for what in ("share", "other")))
FIGURES = (*SIZES, *(f"{pair}, {name}" for pair in PAIRS for name in ("Spearman", "Pearson")))


class FreezingStudy(QuestionStudy):
    """The effect of leaving a component out, in a pass with the prompt's attention held and in an ordinary one.

    What is left out, one at a time: every token but special ones (replaced by a neutral one; and what it brings into
    layer 0 at zero), about 30 heads, as many of every layer, and 16 neurons, drawn with chances in proportion to the
    norm of what they write. In a mixture of experts there are no neurons. ``total`` is the fall of the read, ``frozen``
    that with attention's probabilities held while values, norms and MLPs react, ``attention`` the rest. A rule's
    ``share`` is its score; ``other`` = frozen - share is what norms and MLPs do otherwise than the rule has it.
    Neurons have no share under the softmax rule: an exact one takes all neurons of a layer.
    """

    name = "freezing"
    title = "The cost of frozen attention"

    def __init__(self, engine: Any, settings: Settings) -> None:
        super().__init__(engine, settings)
        check_freezable(engine)
        adapter = engine.adapter
        dense = not any(adapter.is_mixture(index) for index in range(adapter.n_layers))
        self.kinds = (REPLACED, ZEROED, HEADS, *((NEURONS,) if dense else ()))

    def measure(self, item: Item) -> Row:
        question: Question = item.value
        trace, shares = self.engine.trace(question.ids), self._shares(question)
        draw = torch.Generator().manual_seed(self.seed_of(question))
        free = (~question.special).nonzero().flatten().cpu()
        chosen = {REPLACED: free, ZEROED: free, HEADS: drawn_heads(self.engine, DRAWN_HEADS, draw)}
        if NEURONS in self.kinds:
            chosen[NEURONS] = drawn_neurons(neuron_norms(self.engine, trace), DRAWN_NEURONS, draw)
        row: Row = {"tokens": len(question.ids), "rounding": 0.0, "effects": {}}
        for kind in self.kinds:
            found = effects(self.engine, question, trace, kind, chosen[kind])
            row["rounding"] = max(row["rounding"], rounded(found.rounding, 2))
            of_rules = {rule: _at(shares[SHARES_OF[kind]][rule], chosen[kind]) for rule in RULES[SHARES_OF[kind]]}
            row["effects"][kind] = {read: _figures(found, of_rules, READS.index(read)) for read in SHOWN}
            if kind == HEADS:
                row["layers"] = _by_layer(found, chosen[kind][:, 0], READS.index(CONTRAST))
        return row

    def _shares(self, question: Question) -> dict[str, dict[str, Tensor]]:
        """Return every rule's scores of all components, by kind: the reads first, (3, N) or (3, L, W)."""
        kinds = list(dict.fromkeys(SHARES_OF[kind] for kind in self.kinds))
        found: dict[str, dict[str, Tensor]] = {kind: {} for kind in kinds}
        for rule in (SOFTMAX, SHAPLEY):
            of_rule = [kind for kind in kinds if rule in RULES[kind]]
            for kind, scores in scores_of(self.engine, question, of_rule, only=[rule]).items():
                found[kind][rule] = torch.stack([scores[rule, read] for read in READS])
        return found

    def summary(self, rows: Sequence[Row]) -> Row:
        made: Row = {kind: {read: self._summed(rows, kind, read) for read in SHOWN} for kind in rows[0]["effects"]}
        by_layer = [list(_layers(row["layers"])) for row in rows]
        made["layers"] = [
            {name: self._mean([row[layer][name] for row in by_layer]) for name in (*PARTS, EXPLAINED)}
            for layer in range(len(by_layer[0]))
        ]
        return made

    def _summed(self, rows: Sequence[Row], kind: str, read: str) -> Row:
        """Return the means of all figures over prompts, and the part of the effects that frozen attention explains."""
        given = [dict(zip(FIGURES, row["effects"][kind][read], strict=True)) for row in rows]
        made = {EXPLAINED: self._mean([_explained(one) for one in given])}
        return made | {name: self._mean([one[name] for one in given]) for name in FIGURES}

    def _mean(self, values: Sequence[float | None]) -> Row:
        found = mean([math.nan if x is None else x for x in values], self.settings.seed)
        return {name: rounded(x) if isinstance(x, float) else x for name, x in found.items()}

    def facts(self) -> Row:
        return {"figures": FIGURES, "synthetic": synthetic_table()}

    @staticmethod
    def tables(result: Row) -> list[Table]:
        summary = {kind: of_kind for kind, of_kind in result["summary"].items() if kind != "layers"}
        return [_known(result["synthetic"]), _sizes(summary), _agreement(summary)]

    @staticmethod
    def panels(result: Row) -> list[Panel]:
        layers = result["summary"]["layers"]
        title, y = "Heads left out", "mean size of the effect (logit difference)"
        return [_panel(title, y, layers, PARTS), _panel(f"{title}: {EXPLAINED}", "part", layers, (EXPLAINED,))]


def synthetic_table() -> dict[str, list[float | None]]:
    """Return the parts of the synthetic model's effects by component.

    They are the frozen part and attention's as they must be, then both as they are measured, and the share under the
    softmax rule.
    """
    engine, question = synthetic.build()
    trace, known = engine.trace(question.ids), synthetic.expected()
    chosen = {ZEROED: torch.arange(len(question.ids) - 1), HEADS: torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])}
    scores = scores_of(engine, question, (TOKENS, HEADS), only=[SOFTMAX])
    rows = []
    for kind, which in chosen.items():
        found = effects(engine, question, trace, kind, which)
        shares = _at(torch.stack([scores[SHARES_OF[kind]][SOFTMAX, read] for read in READS]), which)
        at = READS.index(CONTRAST)
        rows += torch.stack([found.frozen[:, at], found.attention[:, at], shares[:, at]], 1).tolist()
    return {
        name: [rounded(x, 6) for x in (*parts, *row)] for (name, parts), row in zip(known.items(), rows, strict=True)
    }


def _at(scores: Tensor, chosen: Tensor) -> Tensor:
    """Return the scores (3, N) or (3, L, W) of the components ``chosen``, as :func:`effects` takes them: (K, 3)."""
    return scores[:, chosen].T if chosen.ndim == 1 else scores[:, chosen[:, 0], chosen[:, 1]].T


def _figures(found: Effects, shares: Mapping[str, Tensor], read: int) -> list[float | None]:
    """Return :data:`FIGURES`: sizes, and correlations over the components left out; None where there is none."""
    parts = {part: getattr(found, part)[:, read] for part in PARTS}
    parts |= {rule: of_rule[:, read] for rule, of_rule in shares.items()}
    made: dict[str, float] = {part: _size(parts[part]) for part in PARTS}
    for rule in shares:
        made |= {f"{rule} share": _size(parts[rule]), f"{rule} other": _size(parts[FROZEN] - parts[rule])}
    for pair in PAIRS:
        a, b = (parts.get(name) for name in pair.split(" ~ "))
        if a is not None and b is not None:
            made |= {f"{pair}, Spearman": spearman(a, b), f"{pair}, Pearson": pearson(a, b)}
    values = [made.get(name, math.nan) for name in FIGURES]
    return [rounded(value, 4) for value in values]


def _by_layer(found: Effects, layers: Tensor, read: int) -> dict[str, list[float | None]]:
    """Return the mean size of every part over the heads of each layer."""
    each = [layers == layer for layer in range(int(layers.max()) + 1)]
    return {part: [rounded(_size(getattr(found, part)[of_layer, read]), 3) for of_layer in each] for part in PARTS}


def _layers(row: Mapping[str, Sequence[float]]) -> Iterator[dict[str, float | None]]:
    """Yield the figures of every layer of a row."""
    for sizes in zip(*(row[part] for part in PARTS), strict=True):
        of_layer: dict[str, float | None] = dict(zip(PARTS, sizes, strict=True))
        yield {**of_layer, EXPLAINED: _explained(of_layer)}


def _size(values: Tensor) -> float:
    return float(values.abs().mean())


def _explained(figures: Mapping[str, Any]) -> float | None:
    """Return the frozen part's size over that of both parts, 0 to 1; None where both are zero."""
    both = figures[FROZEN] + figures[ATTENTION]
    return figures[FROZEN] / both if both else None


# -- tables and the picture -------------------------------------------------------------------------------------------


def _known(synthetic: Row) -> Table:
    header = ["left out", "frozen, expected", "measured", "attention, expected", "measured", "share (softmax)"]
    rows = [
        [name, *(f"{value:.5f}" for value in (of[0], of[2], of[1], of[3], of[4]))] for name, of in synthetic.items()
    ]
    note = "Two layers of attention built by hand, whose effects are known; the share is to be the frozen part."
    return Table("A model whose effects are known", header, rows, note=note)


def _sizes(summary: Row) -> Table:
    header = ["left out", "read", TOTAL, FROZEN, ATTENTION, EXPLAINED, *SIZES[len(PARTS) :]]
    rows = [
        [kind, read, *(figure(found[name]) for name in header[2:])]
        for kind, of_kind in summary.items()
        for read, found in of_kind.items()
    ]
    note = (
        f"Mean sizes over the components of a prompt. `{FROZEN}`: the effect with attention held; `{ATTENTION}`: the "
        f"rest; `{EXPLAINED}`: the frozen part's size over that of both. `share`: a rule's score; `other`: the frozen "
        "effect less the share, which norms and MLPs make."
    )
    return Table("Sizes of the effects and their parts", header, rows, left=2, note=note)


def _agreement(summary: Row) -> Table:
    names = [f"{read}, {name}" for read in SHOWN for name in ("Spearman", "Pearson")]
    rows = [
        [kind, pair, *(figure(of_kind[read][f"{pair}, {name}"]) for read, name in (n.split(", ") for n in names))]
        for kind, of_kind in summary.items()
        for pair in PAIRS
    ]
    shown = [row for row in rows if set(row[2:]) != {"-"}]
    note = "Correlations over the components of a prompt, of a rule's shares with the effects, and of the two effects."
    return Table("Agreement of shares and effects", ["left out", "pair", *names], shown, left=2, note=note)


def _panel(title: str, y: str, layers: Sequence[Row], names: Sequence[str]) -> Panel:
    x = list(range(len(layers)))
    each = {
        name: [[math.nan if one[name][k] is None else one[name][k] for one in layers] for k in ("mean", "low", "high")]
        for name in names
    }
    lines = {name: (x, middle) for name, (middle, _, _) in each.items()}
    return Panel(title, "layer", y, lines, {name: (x, low, high) for name, (_, low, high) in each.items()})
