"""Study: the adjoint sweep against exact scores of every start layer, and its estimate and warnings against the truth.

The sweep over the neurons of all layers is run as it is by default, and unrefined. Exact scores are those of the start
layers that are asked for: a layer's exact run carries every neuron through all layers behind it, so that the first one
costs most by far. Under a linear rule the sweep is exact, and what is left is rounding.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from ...adjoint.estimate import MOST_OF_A_LAYER, spearman
from ...components.model import Neurons
from ...engine import DePass
from ...options import LINEAR, Adjoint
from ...results.attribution import Attribution
from ...results.estimate import ApproximationWarning
from ...results.layered import LayeredAttribution
from ...trace.record import Trace
from ..questions import Question
from ..statistics import mean, pearson, relative_error, rounded, top_overlap
from ..study import Item, QuestionStudy, Row, Settings
from ..tables import Panel, Table, figure

WRONG, RIGHT = 0.05, 0.02  # above the first a layer must be named, below the second it must not
BANDS = (0.0, RIGHT, WRONG, math.inf)
DEFAULT, UNREFINED, SHAPLEY = "default", "unrefined", "shapley"
METHODS: Mapping[str, Adjoint] = {DEFAULT: Adjoint(), UNREFINED: Adjoint(refine=0)}
# start layers: these, and so many more up to the last but one: behind the last, nothing is approximated
FIRST, SPREAD, QUICK = (0, 2), 3, (0, 2)
TOP = 0.01  # the largest scores whose overlap is measured
FIGURES = ("error", "spearman", "pearson", "top1_overlap")


# -- what a sweep found, and the truth --------------------------------------------------------------------------------


def sweep(
    engine: DePass, trace: Trace, method: Adjoint, target: Any = None, **options: Any
) -> tuple[LayeredAttribution, float]:
    """Return the neurons of all layers by the sweep, and the seconds that it took. Its warnings are not issued."""
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ApproximationWarning)
        found = engine.attribute(trace, Neurons(layers="all"), target, method=method, **options)
    return found, time.perf_counter() - began


def exact_layers(
    engine: DePass, trace: Trace, layers: Sequence[int], target: Any = None, **options: Any
) -> tuple[LayeredAttribution, float]:
    """Return the neurons of ``layers`` by exact propagation, and the seconds that it took."""
    began = time.perf_counter()
    found = engine.attribute(trace, Neurons(layers=list(layers)), target, method="exact", **options)
    return found, time.perf_counter() - began


def pairs(found: LayeredAttribution, exact: LayeredAttribution) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield every layer of ``exact``, with the scores (I,) of its neurons by both."""
    for one in exact:
        yield one.layer, _named(found[one.layer]), _named(one)


def is_named(layer: int, said: Sequence[str] | None) -> bool:
    """True if a result's warnings name the layer."""
    return f"layer {layer} " in "; ".join(said or [])


def _named(result: Attribution) -> Tensor:
    return result.scores[: len(result.labels) - result.n_extras]


# -- the study --------------------------------------------------------------------------------------------------------


class AdjointStudy(QuestionStudy):
    """The sweep over all layers, by default and unrefined, against exact scores at some start layers.

    A prompt takes one or two minutes for a model of 135 million parameters on one thread: ask for few prompts.
    """

    name = "adjoint"
    title = "The adjoint sweep on trained models"

    def __init__(self, engine: DePass, settings: Settings) -> None:
        super().__init__(engine, settings)
        last = engine.adapter.n_layers - 1
        among = [round(FIRST[-1] + (last - 1 - FIRST[-1]) * i / SPREAD) for i in range(1, SPREAD + 1)]
        default = QUICK if settings.quick else [*FIRST, *among]
        self.layers = self.chosen_layers(layer for layer in default if 0 <= layer <= last)

    def measure(self, item: Item) -> Row:
        question: Question = item.value
        trace = self.engine.trace(question.ids)
        exact, seconds = exact_layers(self.engine, trace, self.layers, question.target)
        row: Row = {"tokens": len(question.ids), "exact_seconds": rounded(seconds)}
        for name, method in METHODS.items():
            found, seconds = sweep(self.engine, trace, method, question.target)
            row[name] = self._compared(found, exact, seconds)
        row[SHAPLEY] = self._linear(trace, question)
        return row

    @staticmethod
    def _compared(found: LayeredAttribution, exact: LayeredAttribution, seconds: float) -> Row:
        """Return a sweep's figures at every layer of ``exact``, and what it says of itself."""
        assert found.estimate is not None and found.estimate.layer_errors is not None
        estimated, layers = found.estimate.layer_errors, []
        for layer, scores, true in pairs(found, exact):
            figures = {
                "error": relative_error(scores, true),
                "spearman": spearman(scores, true),
                "pearson": pearson(scores, true),
                "top1_overlap": top_overlap(scores, true, max(1, round(TOP * len(true)))),
                "estimate": estimated[layer],
            }
            named = is_named(layer, found.warnings)
            layers.append({"layer": layer, **{name: rounded(x) for name, x in figures.items()}, "named": named})
        return {"seconds": rounded(seconds), "layers": layers, "warnings": found.warnings or []}

    def _linear(self, trace: Trace, question: Question) -> Row:
        """Return what the sweep is off by under a linear rule, at the last start layer: it costs least."""
        found, seconds = sweep(self.engine, trace, LINEAR, question.target, allocation=SHAPLEY)
        exact, exact_seconds = exact_layers(self.engine, trace, self.layers[-1:], question.target, allocation=SHAPLEY)
        [(layer, scores, true)] = pairs(found, exact)
        return {
            "layer": layer,
            "error": rounded(relative_error(scores, true)),
            "seconds": rounded(seconds),
            "exact_seconds": rounded(exact_seconds),
        }

    def facts(self) -> Row:
        return {"start_layers": self.layers, "wrong": WRONG, "right": RIGHT, "named_above": MOST_OF_A_LAYER}

    def summary(self, rows: Sequence[Row]) -> Row:
        seed = self.settings.seed
        found: Row = {"exact_seconds": mean([row["exact_seconds"] for row in rows], seed)}
        for name in METHODS:
            swept = [row[name] for row in rows]
            found[name] = {
                "seconds": mean([one["seconds"] for one in swept], seed),
                "layers": [self._layer([one["layers"][i] for one in swept]) for i in range(len(self.layers))],
                "truth": list(truth([layer for one in swept for layer in one["layers"]])),
                "prompts": list(truth([_worst(one) for one in swept])),
            }
        linear = [row[SHAPLEY] for row in rows]
        found[SHAPLEY] = {
            "layer": linear[0]["layer"],
            "largest_error": max(row["error"] for row in linear),
            "seconds": mean([row["seconds"] for row in linear], seed),
        }
        return found

    def _layer(self, layers: Sequence[Row]) -> Row:
        """Return the means of one start layer over prompts, the worst error, and how often it was named."""
        means = {name: mean([one[name] for one in layers], self.settings.seed) for name in FIGURES}
        means["estimate"] = mean([one["estimate"] for one in layers], self.settings.seed)
        errors = [one["error"] for one in layers]
        more = {"median_error": float(np.median(errors)), "worst_error": max(errors)}
        return {"layer": layers[0]["layer"], **means, **more, "named": sum(one["named"] for one in layers)}

    @staticmethod
    def tables(result: Row) -> list[Table]:
        return [_layers_table(result), _truth_table(result), _prompts_table(result), _cost_table(result)]

    @staticmethod
    def panels(result: Row) -> list[Panel]:
        return [_panel(result, "error", "relative error", True), _panel(result, "pearson", "Pearson", False)]


def truth(found: Sequence[Row]) -> Iterator[Row]:
    """Yield, by the size of the true error, how many there are, how many were named, and estimate over error."""
    for low, high in pairwise(BANDS):
        here = [one for one in found if (low < one["error"] or low == 0.0) and one["error"] <= high]
        ratios = [one["estimate"] / one["error"] for one in here if one["error"]]
        row: Row = {"above": low, "to": None if math.isinf(high) else high, "count": len(here)}
        row["named"] = sum(one["named"] for one in here)
        row["ratio"] = np.percentile(ratios, [20, 50, 80]).tolist() if ratios else None
        yield row


def _worst(swept: Row) -> Row:
    """Return the worst of the start layers of a prompt that are compared, and whether a warning named any of these."""
    named = any(one["named"] for one in swept["layers"])
    return {**max(swept["layers"], key=lambda one: one["error"]), "named": named}


# -- tables and pictures ----------------------------------------------------------------------------------------------


def _layers_table(result: Row) -> Table:
    header = [
        "sweep",
        "start layer",
        "error, %",
        "median, %",
        "worst, %",
        "estimate, %",
        "Spearman",
        "Pearson",
        "top 1 %",
    ]
    rows = []
    for name in METHODS:
        for one in result["summary"][name]["layers"]:
            cells = [name, str(one["layer"]), _percent(one["error"]), f"{100 * one['median_error']:.3f}"]
            cells += [f"{100 * one['worst_error']:.3f}", _percent(one["estimate"])]
            cells += [figure(one[key], 4) for key in ("spearman", "pearson")]
            rows.append([*cells, figure(one["top1_overlap"]), f"{one['named']} of {result['prompts']}"])
    note = (
        f"Means over {result['prompts']} prompts, all neurons of a start layer, by the sweep over all layers. The "
        "error is relative: the norm of the differences over that of the exact scores. The estimate is the result's "
        f"own; a warning names a layer where it is above {result['named_above']:.0%}."
    )
    return Table("Start layers", [*header, "named"], rows, note=note)


def _truth_table(result: Row) -> Table:
    note = (
        "All start layers of all prompts by their true error. The estimate is told over the error: 1 is true, less is "
        "too small."
    )
    header = ["sweep", "true error", "start layers", "named", "not named", "estimate / error: p20", "median", "p80"]
    rows = []
    for name in METHODS:
        for one in result["summary"][name]["truth"]:
            ratios = ["-"] * 3 if one["ratio"] is None else [f"{ratio:.2g}" for ratio in one["ratio"]]
            rows.append([name, _band(one), *_counts(one), *ratios])
    return Table("Truth of the estimate", header, rows, left=2, note=note)


def _prompts_table(result: Row) -> Table:
    note = "All prompts by the error of the worst start layer compared, and whether a warning named any of these."
    header = ["sweep", "worst true error", "prompts", "warned of", "not warned of"]
    rows = [[name, _band(one), *_counts(one)] for name in METHODS for one in result["summary"][name]["prompts"]]
    return Table("Truth of the warnings", header, rows, left=2, note=note)


def _cost_table(result: Row) -> Table:
    found, count = result["summary"], len(result["start_layers"])
    rows = [[f"sweep over all layers, {name}", figure(found[name]["seconds"], 1)] for name in METHODS]
    rows.append([f"sweep over all layers, {SHAPLEY}", figure(found[SHAPLEY]["seconds"], 2)])
    rows.append([f"exact, {count} start layers", figure(found["exact_seconds"], 1)])
    note = (
        f"Mean seconds of a prompt. Under {SHAPLEY}, a linear rule, the sweep is exact: at start layer "
        f"{found[SHAPLEY]['layer']} the largest relative error of a prompt is {found[SHAPLEY]['largest_error']:.0e}."
    )
    return Table("Cost", ["", "seconds"], rows, note=note)


def _percent(found: Row) -> str:
    """Return a mean with its interval as :func:`depass_fast.evaluate.tables.figure` does, times 100."""
    return figure({name: None if found[name] is None else 100 * found[name] for name in ("mean", "low", "high")})


def _band(one: Row) -> str:
    if one["to"] is None:
        return f"above {one['above']:.0%}"
    return f"{one['above']:.0%} to {one['to']:.0%}" if one["above"] else f"up to {one['to']:.0%}"


def _counts(one: Row) -> list[str]:
    return [str(one["count"]), str(one["named"]), str(one["count"] - one["named"])]


def _panel(result: Row, name: str, what: str, log_y: bool) -> Panel:
    """Return a panel over the start layers: both sweeps, and the estimates of the errors."""
    lines, bands = {}, {}
    for method in METHODS:
        layers = result["summary"][method]["layers"]
        for key, label in ((name, method), ("estimate", f"{method}, as estimated")):
            if key == "estimate" and name != "error":
                continue
            x = [one["layer"] for one in layers]
            lines[label] = (x, [one[key]["mean"] for one in layers])
            if all(one[key]["low"] is not None for one in layers):
                bands[label] = (x, [one[key]["low"] for one in layers], [one[key]["high"] for one in layers])
    return Panel(what, "start layer", what, lines, bands, log_y=log_y)
