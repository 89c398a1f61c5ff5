"""Study: scores of a layer's neurons in groups against all at once, with time and peak memory.

Where memory is short, the published algorithm decomposes a layer's neurons in groups: a group's neurons are components,
all others are one component with the rest of the hidden state, and each group is carried through the network by itself.
That changes the components among which a neuron is shared, so the scores depend on the number of groups. Under a linear
rule components do not meet, and grouping changes nothing.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...adapters import Adapter
from ...adjoint.estimate import spearman
from ...components.model import Neurons
from ...components.products import BoundProducts
from ...engine import DePass
from ...state.state import Factors
from ...trace.record import Trace
from ..peak import give_back, measurable, measured
from ..questions import Question
from ..statistics import mean, pearson, relative_error, rounded, top_overlap
from ..study import Item, QuestionStudy, Row, Settings
from ..tables import Panel, Table, figure

ROWS = 1 << 18  # the most rows of the component state at once
CONTIGUOUS, RANDOM, ALL = "contiguous", "random", "all at once"
SOFTMAX, SHAPLEY = "softmax", "shapley"
COUNTS = (2, 8, 64)
OTHERWISE = 8  # groups that are drawn at random, too, and that a linear rule is tried with, at the last of the layers
QUICK, QUICK_OTHERWISE = (4,), 4
TOP = 0.01  # the largest scores whose overlap is measured
FIGURES = ("relative_error", "spearman", "pearson", "top1_overlap", "seconds", "peak_mib")


# -- scores in groups -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class GroupedNeurons(Neurons):
    """The neurons of one group for every prompt of a trace; all others stay in `rest`."""

    groups: Sequence[Tensor] = ()

    def counts(self, adapter: Adapter, trace: Trace) -> list[int]:
        return [len(group) for group in self.groups]

    def bound(self, adapter: Adapter, trace: Trace, prompt: int) -> BoundProducts:
        products, here = super().bound(adapter, trace, prompt), self.groups[prompt]
        if not isinstance(products, BoundProducts):
            raise ValueError("model: grouped neurons are for models of one residual stream; this one has several.")
        factors = products.products
        assert factors.coefficients is not None  # neurons are numbers times vectors
        at = here.to(factors.vectors.device)
        chosen = Factors(factors.coefficients[:, at], factors.vectors[at])
        return replace(products, labels=tuple(products.labels[i] for i in here.tolist()), products=chosen)


def grouped_scores(
    engine: DePass,
    ids: Tensor,
    layer: int,
    groups: Sequence[Tensor],
    target: Any = None,
    *,
    rows: int = ROWS,
    **options: Any,
) -> Tensor:
    """Return the exact scores (I,) of a layer's neurons on ids (N,), each from the run of its own group.

    ``groups`` hold every neuron once, by its number. They are the prompts of one jagged batch, as many at a time as
    have a state of ``rows`` rows: 0 for one group after the other, as published. ``options`` are those of
    :meth:`depass_fast.DePass.attribute`.
    """
    scores, traces = torch.zeros(sum(map(len, groups))), {}
    for part in _parts(groups, len(ids), rows):
        if len(part) not in traces:
            traces[len(part)] = replace(engine.trace([ids] * len(part)), batch=True)  # one group is a batch, too
        kind = GroupedNeurons(layer, groups=part)
        results = engine.attribute(traces[len(part)], kind, target, method="exact", **options)
        for result, here in zip(results, part, strict=True):
            scores[here] = result.scores[: len(here)].float().cpu()
    return scores


def _parts(groups: Sequence[Tensor], length: int, rows: int) -> Iterator[Sequence[Tensor]]:
    """Yield runs of groups whose state has at most ``rows`` rows, one group at least."""
    each = max(1, rows // (length * (max(map(len, groups)) + 1)))
    for first in range(0, len(groups), each):
        yield groups[first : first + each]


def split(width: int, count: int, grouping: str, seed: int = 0) -> list[Tensor]:
    """Return ``width`` neurons in ``count`` groups, as equal as can be: "contiguous", or "random"."""
    order = torch.arange(width)
    if grouping == RANDOM:
        order = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
    return [part.sort().values for part in order.tensor_split(count)]


def compare(scores: Tensor, exact: Tensor) -> dict[str, float]:
    """Return how far scores (I,) are from the exact ones.

    ``relative_error`` is ‖scores - exact‖ / ‖exact‖, ``max_error`` the largest difference over the largest exact score,
    ``sum_ratio`` the sum of the scores over that of the exact ones.
    """
    difference = scores - exact
    return {
        "relative_error": relative_error(scores, exact),
        "max_error": float(difference.abs().max() / exact.abs().max()),
        "spearman": spearman(scores, exact),
        "pearson": pearson(scores, exact),
        "top1_overlap": top_overlap(scores, exact, max(1, round(TOP * len(exact)))),
        "sum_ratio": float(scores.sum() / exact.sum()),
    }


# -- the study --------------------------------------------------------------------------------------------------------


class GroupingStudy(QuestionStudy):
    """A layer's neurons in groups, one group after the other, against all at once.

    Every way costs about as much time as all at once, the more the earlier the layer.
    """

    name = "grouping"
    title = "Grouping and memory"

    def __init__(self, engine: DePass, settings: Settings) -> None:
        super().__init__(engine, settings)
        count = engine.adapter.n_layers  # behind the last layer there is no MLP that neurons could share
        default = {min(count // 2, count - 1), max(0, min(count * 5 // 6, count - 2))}
        self.layers = self.chosen_layers([min(default)] if settings.quick else default)
        self.counts, self.otherwise = (QUICK, QUICK_OTHERWISE) if settings.quick else (COUNTS, OTHERWISE)
        self._is_warm = False

    def measure(self, item: Item) -> Row:
        question: Question = item.value
        if not self._is_warm:
            self._warm_up(question)
        runs = [run for layer in self.layers for run in self._runs(question, layer)]
        return {"tokens": len(question.ids), "runs": runs}

    def _warm_up(self, question: Question) -> None:
        """Do everything once, untimed: a first call compiles kernels and fills caches."""
        for rule in (SOFTMAX, SHAPLEY):
            list(self._compared(question, self.layers[-1], rule, [(CONTIGUOUS, self.counts[0])]))
        self._is_warm = True

    def _runs(self, question: Question, layer: int) -> Iterator[Row]:
        """Yield the figures of every rule, grouping and number of groups at one layer."""
        ways = [(CONTIGUOUS, count) for count in self.counts] + [(RANDOM, self.otherwise)]
        yield from self._compared(question, layer, SOFTMAX, ways)
        if layer == self.layers[-1]:
            yield from self._compared(question, layer, SHAPLEY, [(CONTIGUOUS, self.otherwise)])

    def _compared(self, question: Question, layer: int, rule: str, ways: Sequence[tuple[str, int]]) -> Iterator[Row]:
        given: dict[str, Any] = {"allocation": rule}

        def whole() -> Tensor:
            found = self.engine.attribute(question.ids, Neurons(layer), question.target, method="exact", **given)
            return found.scores[: len(found.labels) - found.n_extras].float().cpu()

        exact, cost = self._timed(whole)
        yield {"layer": layer, "rule": rule, "grouping": ALL, "groups": 1, "neurons": len(exact), **cost}
        for grouping, count in ways:
            groups = split(len(exact), min(count, len(exact)), grouping, self.seed_of(question))

            def one_by_one(groups: Sequence[Tensor] = groups) -> Tensor:
                return grouped_scores(self.engine, question.ids, layer, groups, question.target, rows=0, **given)

            scores, cost = self._timed(one_by_one)
            distance = {name: rounded(value) for name, value in compare(scores, exact).items()}
            yield {"layer": layer, "rule": rule, "grouping": grouping, "groups": len(groups), **distance, **cost}

    def _timed(self, call: Callable[[], Tensor]) -> tuple[Tensor, dict[str, float | None]]:
        """Return what ``call`` returns, its seconds, and the MiB of its peak; None where the system does not tell."""
        device, found, took = self.engine.adapter.device, [], []

        def run() -> None:
            began = time.perf_counter()
            found.append(call())  # on the host in the end: a GPU has then done its work
            took.append(time.perf_counter() - began)

        peak = None
        if measurable(device):
            if device.type == "cpu":
                give_back()
            peak = rounded(measured(run, device) / 2**20)
        else:
            run()
        return found[0], {"seconds": rounded(took[0]), "peak_mib": peak}

    def facts(self) -> Row:
        return {"start_layers": self.layers, "counts": list(self.counts)}

    def summary(self, rows: Sequence[Row]) -> Row:
        """Return the means of every way, and median, p20 and p80 of ``sum_ratio``, whose divisor may be small."""
        ways: dict[tuple, list[Row]] = defaultdict(list)
        for row in rows:
            for run in row["runs"]:
                ways[run["layer"], run["rule"], run["grouping"], run["groups"]].append(run)
        return {"runs": [self._together(way, runs) for way, runs in ways.items()]}

    def _together(self, way: tuple, runs: Sequence[Row]) -> Row:
        means = {name: mean([run[name] for run in runs], self.settings.seed) for name in FIGURES if name in runs[0]}
        found = {**dict(zip(("layer", "rule", "grouping", "groups"), way, strict=True)), **means}
        if "sum_ratio" in runs[0]:
            low, middle, high = np.quantile([run["sum_ratio"] for run in runs], [0.2, 0.5, 0.8]).tolist()
            found["sum_ratio"] = {"median": middle, "p20": low, "p80": high}
        return found

    @staticmethod
    def tables(result: Row) -> list[Table]:
        note = (
            f"Means over {result['prompts']} prompts. Groups run one after the other. The error is relative: the norm "
            "of the differences over that of the exact scores. Sum: that of all scores over the exact one's, median. "
            "Time and peak memory are those of the run, beyond the model."
        )
        header = ["rule", "layer", "groups", "", "relative error", "Spearman", "Pearson", "top 1 %", "sum", "seconds"]
        rows = [_cells(run) for run in result["summary"]["runs"]]
        return [Table("Neurons in groups", [*header, "peak, MiB"], rows, left=1, note=note)]

    @staticmethod
    def panels(result: Row) -> list[Panel]:
        drawn = (
            ("relative error", "relative_error", True),
            ("Spearman", "spearman", False),
            ("peak memory, MiB", "peak_mib", False),
        )
        found = [_panel(result["summary"]["runs"], *one) for one in drawn]
        return [panel for panel in found if panel is not None]


def _cells(run: Row) -> list[str]:
    """Return a row of the table."""
    cells = [run["rule"], str(run["layer"]), str(run["groups"]), run["grouping"]]
    if run["grouping"] == ALL:
        cells += ["0", "1", "1", "1", "1"]
    else:
        error = run["relative_error"]
        cells.append(figure(error) if error["mean"] > 1e-3 else f"{error['mean']:.0e}")
        cells += [figure(run[name]) for name in ("spearman", "pearson", "top1_overlap")]
        cells.append(f"{run['sum_ratio']['median']:.2f}")
    return [*cells, figure(run["seconds"], 1), figure(run["peak_mib"], 0)]


def _panel(runs: Sequence[Row], what: str, name: str, log_y: bool) -> Panel | None:
    """Return a panel of the contiguous groups under softmax; None where nothing was measured."""
    lines, bands = {}, {}
    for layer in sorted({run["layer"] for run in runs}):
        points = [
            (run["groups"], run[name])
            for run in runs
            if run["layer"] == layer and run["rule"] == SOFTMAX and run["grouping"] != RANDOM and name in run
        ]
        points = [(x, y) for x, y in points if y["mean"] is not None]
        if not points:
            continue
        label = f"layer {layer}"
        lines[label] = ([x for x, _ in points], [y["mean"] for _, y in points])
        if all(y["low"] is not None for _, y in points):
            bands[label] = (lines[label][0], [y["low"] for _, y in points], [y["high"] for _, y in points])
    if not lines:
        return None
    return Panel(what, "groups", what, lines, bands, log_y=log_y, log_x=True)
