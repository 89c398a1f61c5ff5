"""The summary, the tables and the picture of the study `components`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..circuits import CMD, CPR, cmd, cpr, faithfulness
from ..comparison import cell, compared, compared_of_means
from ..interventions import NEURONS
from ..masking import BY_SIZE, HIGHEST, LOWEST, RANKINGS, SIGNED
from ..methods.base import GRADIENT, NO_READ, NORM, RANDOM, SHAPLEY, SOFTMAX
from ..questions import LOG_PROB
from ..statistics import rounded
from ..study import Row
from ..tables import Panel, Table

ACCURACY, PROBABILITY = "accuracy", "probability"
MEASURES = (ACCURACY, PROBABILITY)
GOOD = {LOWEST: "Higher is better.", HIGHEST: "Lower is better."}
MARKED = "An asterisk: the best, or not told from it."
SAID = {
    ACCURACY: "The share of prompts whose next token is still the answer",
    PROBABILITY: "The answer's probability",
}


def name_of(method: str, read: str) -> str:
    """Return the name of a method's scores in a result."""
    return method if read == NO_READ else f"{method}, {read}"


def summary(rows: Sequence[Row], kind: str, seed: int) -> Row:
    """Return the means of a kind's figures with intervals, every one compared with the best of its column."""
    found = [row[kind] for row in rows]
    masked = {
        ranking: {end: _ends(found, ranking, end, seed) for end in (LOWEST, HIGHEST)} for ranking in RANKINGS
    }  # fmt: skip
    return {"masked": masked, "circuits": {ranking: _circuits(rows, kind, ranking, seed) for ranking in RANKINGS}}


def _ends(found: Sequence[Row], ranking: str, end: str, seed: int) -> Row:
    """Return the figures of one ranking and one end: {measure: {name: mean}}, and the accuracy by share."""
    names = found[0]["masked"]
    made = {name: [_ranked(row["masked"][name], ranking)[end] for row in found] for name in names}
    digits = {name: np.array([[int(digit) for digit in one[0]] for one in each]) for name, each in made.items()}
    values = {
        ACCURACY: {name: one.mean(1).tolist() for name, one in digits.items()},
        PROBABILITY: {name: [one[1] for one in each] for name, each in made.items()},
    }
    means = {measure: compared(values[measure], higher=end == LOWEST, seed=seed) for measure in MEASURES}
    return {**means, "by_share": {name: [rounded(x) for x in one.mean(0)] for name, one in digits.items()}}


def _circuits(rows: Sequence[Row], kind: str, ranking: str, seed: int) -> Row:
    """Return CPR, CMD and the faithfulness by share, of one ranking."""

    def leads_of(row: Row, name: str) -> list[float]:
        found = row[kind]
        return [row["lead"], found["nothing"], *_ranked(found["kept"][name], ranking)]

    leads = {name: np.array([leads_of(row, name) for row in rows]) for name in rows[0][kind]["kept"]}
    return {
        CPR: compared_of_means(leads, cpr, higher=True, seed=seed),
        CMD: compared_of_means(leads, cmd, higher=False, seed=seed),
        "faithfulness": {name: [rounded(x) for x in faithfulness(one.mean(0))] for name, one in leads.items()},
    }


def _ranked(found: Row, ranking: str) -> Any:
    """Return what stands under a ranking; scores without a sign are ranked alike both ways."""
    return found.get(ranking, found[BY_SIZE])


def tables(result: Row) -> list[Table]:
    """Return five tables: each end's accuracy and probability, and the circuits."""
    kinds, found = result["kinds"], result["summary"]
    lacking = "" if NEURONS in kinds else " The neurons of a mixture of experts cannot be masked."
    made = []
    for measure in MEASURES:
        for end in (LOWEST, HIGHEST):
            shares = " and ".join(f"{_percents(result['shares'][kind][end])} of the {kind}" for kind in kinds)
            note = f"{SAID[measure]}, the mean over {shares} masked. {GOOD[end]} {MARKED}{lacking}"
            columns = {
                f"{kind}, {ranking}": found[kind]["masked"][ranking][end][measure]
                for kind in kinds
                for ranking in RANKINGS
            }
            made.append(_table(f"The {end} masked, {measure}", columns, note))
    columns = {
        f"{kind}, {name}, {ranking}": found[kind]["circuits"][ranking][name]
        for kind in kinds
        for name, ranking in ((CPR, SIGNED), (CMD, BY_SIZE))
    }
    note = (
        f"The logit difference, answer minus foil, with only the top {_percents(result['kept'])} kept; the area under "
        f"it (CPR, higher is better) and between it and the model's (CMD, lower is better). {MARKED}{lacking}"
    )
    return [*made, _table("Circuits", columns, note)]


def _table(title: str, columns: Mapping[str, Mapping[str, Any]], note: str) -> Table:
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    rows = [[name, *(cell(column[name]) if name in column else "-" for column in columns.values())] for name in names]
    return Table(title, ["ranked by", *columns], rows, note=note)


def _percents(shares: Sequence[float]) -> str:
    return ", ".join(f"{100 * share:g}" for share in shares) + " %"


def panels(result: Row) -> list[Panel]:
    """Return the accuracy over the masked share, a panel for either end of either kind."""
    chosen = [(name_of(method, LOG_PROB), SIGNED) for method in (SOFTMAX, SHAPLEY, GRADIENT)]
    chosen += [(name, BY_SIZE) for name, _ in chosen] + [(name, BY_SIZE) for name in (NORM, RANDOM)]
    made = []
    for kind in result["kinds"]:
        for end in (LOWEST, HIGHEST):
            x = [100 * share for share in result["shares"][kind][end]]
            found = {ranking: result["summary"][kind]["masked"][ranking][end]["by_share"] for ranking in RANKINGS}
            lines = {
                f"{name}, {ranking}": (x, found[ranking][name]) for name, ranking in chosen if name in found[ranking]
            }
            wide = kind == NEURONS and end == HIGHEST
            made.append(Panel(f"{kind}, the {end} masked", f"% of all {kind}", ACCURACY, lines, log_x=wide))
    return made
