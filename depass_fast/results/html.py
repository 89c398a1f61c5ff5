"""Results as pages: the sheets of an attribution (docs/report.md), and the small picture that notebooks show."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..labels import BIAS, REST, shown_labels
from ..report.fragment import fragment
from ..report.page import write_page
from ..report.sheet import FROZEN, Sheet, components_view, tokens_view
from ..report.units import Group, group_of, leading, unit_of
from ..runtime.paths import check_path
from .interface import Result
from .render import about, headline, value_name

MOST_ROWS = 400  # components of a table that are listed
FEW_ROWS = 12  # in a notebook
ALL_HEADS = 8192  # up to so many components of a grid, none is left out
_REST = "rest is what the residual stream holds without these components."
_INSTEAD = {
    "Sweep": "The means of a sweep are no parts of one sum: plot() draws them with their errors, mean() is the table.",
    "Trace": "A report of a trace is dp.report(trace).",
}


class AsPage:
    """A page of a result, and a picture in notebooks: shared by all that `attribute` returns."""

    def to_html(self, path: str | Path) -> None:
        """Write a page that shows the shares: one HTML file that works without a network (docs/report.md).

        Rows are the leading components, and `others` holds the sum of those that are left out.

        Raises:
            ImportError: a package of the extra ``report`` is not installed.
            ValueError: the scores hold NaN or infinity.
            OSError: there is no such folder (FileNotFoundError), or the file cannot be written.
        """
        write_html(self, path)

    def page_parts(self) -> list[tuple[str, Result]]:
        """Return the results that have sheets on a page, each with a name, which may be empty."""
        return [("", self)]  # pyright: ignore[reportReturnType] (the classes that inherit this are results)

    def page_sheets(self) -> list[Sheet]:
        """Return the sheets of the page."""
        return [sheet for name, result in self.page_parts() for sheet in sheets_of(result, name)]

    def few_sheets(self) -> tuple[list[Sheet], int]:
        """Return the sheets that a notebook shows, and how many others there are."""
        (name, result), more = self.page_parts()[0], len(self.page_parts()) - 1
        sheets = sheets_of(result, name, FEW_ROWS, targets=range(min(3, len(result.target_names))))
        return sheets, more + len(result.target_names) - len(sheets)

    def _repr_html_(self) -> str | None:
        """Return a small picture without scripts; None, for which notebooks take ``repr``, where there is none."""
        with contextlib.suppress(Exception):  # a repr never fails
            return fragment(*self.few_sheets())
        return None


def write_html(results: Any, path: str | Path) -> None:
    """Write results as one page: a result of any call, or a list of them, as several prompts or positions give.

    Every target of every result has a sheet; the page shows one at a time. Errors as of :meth:`AsPage.to_html`.

    Raises:
        TypeError: something among them is no result.
    """
    check_path(path)
    write_page([sheet for number, one in enumerate(_flat(results)) for sheet in _sheets(one, number)], path)


def _flat(results: Any) -> Iterable[Any]:
    if isinstance(results, (list, tuple)):
        return [one for part in results for one in _flat(part)]
    return [results]


def _sheets(one: Any, number: int) -> list[Sheet]:
    if isinstance(one, AsPage):
        return one.page_sheets()
    if isinstance(getattr(one, "sheets", None), list):  # a report
        return one.sheets
    raise TypeError(
        f"write_html: number {number} is of type {type(one).__name__}, which has no page. Pages are of results of "
        "attribute() and attribute_generation(), ledgers and their answers, explanations and credits of attention, and "
        f"reports. {_INSTEAD.get(type(one).__name__, '')}".rstrip()
    )


def sheets_of(
    result: Result, name: str = "", most: int = MOST_ROWS, targets: Sequence[int] | None = None
) -> list[Sheet]:
    """Return a sheet for each target of a result; ``most`` bounds the rows of its table."""
    every = range(len(result.target_names)) if targets is None else targets
    return [_sheet(result, target, name, most) for target in every]


def _sheet(result: Result, target: int, name: str, most: int) -> Sheet:
    by_layer = layers_of(result)
    sheet = empty_sheet(result, target, name, unit_of(_largest(by_layer, target)))
    if result.components == "tokens":
        group, positions = token_group(result, target, sheet.unit)
        sheet.views.append(tokens_view(group, positions))
    else:
        sheet.views.append(tokens_view(Group([], (0, 0), None, None, 0), []))
    grid = result.components == "heads" and len(by_layer) > 1 and len(result.labels) <= ALL_HEADS
    groups = groups_of(by_layer, target, sheet.unit, ALL_HEADS if grid else most)
    lead = {"lead": _REST} if any(group.rest for group in groups) else {}
    title = f"{result.components.capitalize()} at {result.layer_text()}"
    sheet.views.append(components_view(result.components, title, groups, lead))
    return sheet


def empty_sheet(result: Result, target: int, name: str, unit: float) -> Sheet:
    """Return the sheet of a result's target without its views."""
    said = list(result.warnings or [])
    if not result.is_exact:
        said.append("Approximate: first-order scores of the adjoint sweep")
    read = headline(result, target)
    return Sheet(
        name=f"{name}: {result.target_names[target]}" if name else f"{read.partition(':')[0]}",
        headline=read,
        target=result.target_names[target],
        what=value_name(result, target),
        value=float(result.target_logits.reshape(-1)[target]),
        unit=unit,
        error=float(result.completeness_error),
        exact=result.is_exact,
        about=about(result),
        tokens=result.tokens,
        position=result.position,
        warnings=said,
        notes=[FROZEN],
        made_with=None if result.provenance is None else result.provenance.told(),
    )


def layers_of(result: Any) -> list[Any]:
    """Return the attributions of a result: of each layer, or itself."""
    return list(getattr(result, "by_layer", [result]))


def _scores(one: Any, target: int) -> np.ndarray:
    return one.scores_of(target).double().cpu().numpy()


def _largest(by_layer: Sequence[Any], target: int) -> float:
    found = [abs(float(one.target_logits.reshape(-1)[target])) for one in by_layer]
    return max(*found, *(float(np.abs(_scores(one, target)).max()) for one in by_layer))


def _extras(one: Any, scores: np.ndarray) -> dict[str, Any]:
    """Return `rest` and `bias` of an attribution as the arguments of a group."""
    found = dict(zip(one.labels[-2:], scores[-2:].tolist(), strict=True))
    return {"rest": found.get(REST), "bias": found.get(BIAS)}


def shown_group(result: Result, group: Group) -> Group:
    """Return a group of a result's components, in which those that are tokens are labelled as they are shown."""
    if result.components != "tokens":
        return group
    labels = shown_labels([label for label, _ in group.rows], result.tokens)
    return replace(group, rows=[(label, number) for label, (_, number) in zip(labels, group.rows, strict=True)])


def map_row(result: Any, target: int, cells: np.ndarray, kept: np.ndarray, unit: float) -> dict[str, Any]:
    """Return what a layer's part is worth at the positions ``kept`` of all, ``cells`` (N,), with the rest of its sum.

    ``result`` is the attribution whose components these are, summed up in another way.
    """
    scores = _scores(result, target)
    group = group_of([""] * len(cells), cells, unit, kept, **_extras(result, scores), layer=result.layer)
    return {**group.plain(), "rows": None, "cells": [number for _, number in group.rows]}


def token_group(result: Any, target: int, unit: float) -> tuple[Group, list[int]]:
    """Return the tokens up to the position that is read as a group, and their positions. Later ones have no share."""
    scores, count = _scores(result, target), min(result.position, len(result.tokens) - 1) + 1
    extras = _extras(result, scores) if len(result.labels) > len(result.tokens) else {}
    named = len(result.labels) - result.n_extras
    assert math.isclose(float(np.abs(scores[count:named]).sum()), 0.0)
    return group_of(result.labels, scores[:count], unit, np.arange(count), **extras), list(range(count))


def groups_of(by_layer: Sequence[Any], target: int, unit: float, most: int) -> list[Group]:
    """Return a group for each layer, of the leading components of all; the three leading ones of a layer are there."""
    every = [_scores(one, target) for one in by_layer]
    named = [scores[: len(scores) - one.n_extras] for one, scores in zip(by_layer, every, strict=True)]
    sizes = np.abs(np.concatenate(named))
    kept = np.arange(len(sizes)) if len(sizes) <= most == ALL_HEADS else leading(sizes, most)
    groups, first = [], 0
    for one, scores, own in zip(by_layer, every, named, strict=True):
        here = kept[(kept >= first) & (kept < first + len(own))] - first
        best = np.argsort(-np.abs(own), kind="stable")[: 3 if most > FEW_ROWS else 0]
        chosen = np.union1d(here, best).astype(int)
        layer = one.layer if one.components != "tokens" or one.layer else None
        groups.append(shown_group(one, group_of(one.labels, own, unit, chosen, **_extras(one, scores), layer=layer)))
        first += len(own)
    return groups
