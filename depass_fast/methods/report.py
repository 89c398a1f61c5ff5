"""The report of a prompt: a ledger's numbers, position by position, as sheets of a page (docs/report.md)."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from ..adapters import Adapter
from ..components.base import ComponentKind
from ..labels import position_labels, shown_tokens
from ..ledger.book import Ledger
from ..ledger.paged import CELLS, ledger_sheets, sheet_of
from ..ledger.places import LayerPlaces, Reading
from ..report.document import Report
from ..report.sheet import Sheet, components_view, tokens_view
from ..report.units import Group, apportioned, in_units, leading
from ..results.html import ALL_HEADS, MOST_ROWS, groups_of, layers_of, map_row, token_group
from ..trace.record import Trace

# numbers that a page holds, at most, so that it stays below three megabytes with two thousand tokens
ENTRIES = 8_000
READINGS, WRITERS = 96, 12  # neurons whose reading is shown, and what of it
READERS = 6  # of every head, which are listed

_TITLES = {
    "tokens": ("All tokens", ""),
    "heads": ("Heads", "The share of every attention head. Choose one to see where it writes and what it carries."),
    "neurons": ("Neurons", ""),
    "features": ("Features", "The features of the dictionary; rest is what it misses."),
}
_NEURONS_LEAD = (
    "The leading neurons. Choose one to see where it writes; of the first {} also what wrote what they read."
)
_HEAD = re.compile(r"L\d+H\d+")

_MAP = {
    "title": "Layers and positions",
    "lead": "What attention and the MLP of every layer write at every position.{} Choose a cell to see its heads or "
    "neurons.",
    "what": "what it writes at every position",
}
_IN_FRONT = " Attention is counted in front of the layer's MLP, so that it holds what the MLP makes of it."
_BEHIND = (
    "modules are counted behind the whole layer; heads{} in front of the layer's MLP, so that they hold what it makes "
    "of them"
)
_LEFT_OUT = (
    "What heads and neurons write at single positions, and what they read, is not shown: reports do not know that of a "
    "model with {}. All sums are exact as in other reports."
)


def report_of(adapter: Adapter, ledger: Ledger, trace: Trace, features: ComponentKind | None) -> Report:
    """Return the report of a ledger of one prompt; ``trace`` is the whole one, which it was made from.

    ``features`` are those of a dictionary, or None.
    """
    if adapter.beyond_one_norm:
        note = _LEFT_OUT.format(", ".join(adapter.beyond_one_norm))
        return Report(list(ledger_sheets(ledger, features, [note])), _text(adapter, ledger, ""))
    pages = _Pages(adapter, ledger, trace, features)  # which share the room that there is
    sheets = [pages.sheet(read, target) for read in range(ledger.n_reads) for target in range(pages.n_targets(read))]
    return Report(sheets, _text(adapter, ledger, ", and the page's map of attention,"))


def _text(adapter: Adapter, ledger: Ledger, of_page: str) -> str:
    """Return what is printed; where heads meet an MLP on their way out of a layer, why modules are other numbers."""
    return str(ledger) if adapter.is_parallel else f"{ledger}\n\n{_BEHIND.format(of_page)}"


class _Pages:
    """The sheets of a ledger, for each of its reads and targets."""

    def __init__(self, adapter: Adapter, ledger: Ledger, trace: Trace, features: ComponentKind | None) -> None:
        layers, reads = range(adapter.n_layers), range(ledger.n_reads)
        found = {"tokens": _by_read(ledger.tokens())}
        if any(map(adapter.has_attention, layers)):
            found["heads"] = _by_read(ledger.heads())
        if any(map(adapter.has_mlp, layers)):
            found["neurons"] = _by_read(ledger.neurons())
        self._results = [{kind: results[read] for kind, results in found.items()} for read in reads]
        self._features = [None for _ in reads] if features is None else _by_read(ledger.scores(features))
        chosen = [
            [] if "neurons" not in found else self._leading_neurons(read, target)
            for read in range(ledger.n_reads)
            for target in range(self.n_targets(read))
        ]
        self._part = max(1, len(chosen))
        self._lead = _MAP["lead"].format("" if adapter.is_parallel else _IN_FRONT)
        self._error = ledger.completeness_error
        self._places, self._readings = ledger.places(trace, chosen)

    def n_targets(self, read: int) -> int:
        return len(self._results[read]["tokens"].target_names)

    def _leading_neurons(self, read: int, target: int) -> list[tuple[int, str]]:
        neurons = self._results[read]["neurons"]
        found = [(abs(score), one.layer, label) for one in neurons for label, score in one.top(READINGS, target)]
        return [(layer, label) for _, layer, label in sorted(found, reverse=True)[:READINGS]]

    def sheet(self, read: int, target: int) -> Sheet:
        """Return the sheet of one target at one position."""
        results = self._results[read]
        row = sum(self.n_targets(before) for before in range(read)) + target
        sheet = sheet_of(results, target, self._error)
        group, positions = token_group(results["tokens"], target, sheet.unit)
        places = [_Row.of(one, row, len(positions)) for one in self._places]
        sheet.views = [tokens_view(group, positions), self._map(results, target, places, sheet.unit)]
        for kind in ("heads", "neurons"):
            if kind in results:
                readings = [one for one in self._readings if one.row == row]
                sheet.views.append(_table(kind, results[kind], target, places, readings, sheet, ENTRIES // self._part))
        if self._features[read] is not None:
            groups = groups_of(layers_of(self._features[read]), target, sheet.unit, MOST_ROWS)
            sheet.views.append(_titled("features", groups))
        groups = groups_of([results["tokens"]], target, sheet.unit, MOST_ROWS)
        sheet.views.append(_titled("tokens", groups))
        return sheet

    def _map(self, results: dict[str, Any], target: int, places: Sequence[_Row], unit: float) -> dict[str, Any]:
        """Return the view of layers by positions: a row for each layer's attention, and for its MLP."""
        every = [(one.layer, name, table.sum(1, dtype=np.float64)) for one in places for name, table in one.parts()]
        sizes = np.sum([np.abs(cells) for _, _, cells in every], 0)
        kept = leading(sizes, max(64, CELLS // self._part // max(1, len(every))), 0.9999)
        parts = []
        for name, kind, title in (("attention", "heads", "Attention"), ("mlp", "neurons", "MLP")):
            rows = [
                map_row(results[kind][layer], target, cells, kept, unit) for layer, part, cells in every if part == name
            ]
            parts += [{"name": name, "title": title, "rows": rows}] if rows else []
        return {
            "kind": "map",
            "id": "map",
            **_MAP,
            "lead": self._lead,
            "positions": kept.tolist(),
            "left": len(sizes) - len(kept),
            "parts": parts,
        }


class _Row:
    """One layer's shares for one row, up to the position that is read: (N, H), (N, H) and (N, I), or None."""

    def __init__(self, layer: int, names: Sequence[str], tables: Sequence[np.ndarray | None]) -> None:
        self.layer, self.names = layer, names
        self.heads, self.sources, self.neurons = tables

    @staticmethod
    def of(places: LayerPlaces, row: int, count: int) -> _Row:
        tables = (places.heads, places.sources, places.neurons)
        return _Row(places.layer, places.names, [None if x is None else x[row, :count].numpy() for x in tables])

    def parts(self) -> list[tuple[str, np.ndarray]]:
        """Return the tables of attention and MLP that there are."""
        found = (("attention", self.heads), ("mlp", self.neurons))
        return [(name, table) for name, table in found if table is not None]


def _by_read(answer: Any) -> list[Any]:
    """Return a ledger's answer as a list with one result for each position that is read."""
    return answer if isinstance(answer, list) else [answer]


def _titled(name: str, groups: Sequence[Group], more: dict[str, Any] | None = None) -> dict[str, Any]:
    title, lead = _TITLES[name]
    return components_view(name, title, groups, {"lead": lead, **(more or {})})


def _table(
    kind: str, result: Any, target: int, places: Sequence[_Row], readings: Sequence[Reading], sheet: Sheet, room: int
) -> dict[str, Any]:
    """Return the table of heads or of neurons, with the positions of each, ``room`` entries at most."""
    unit = sheet.unit
    groups = groups_of(layers_of(result), target, unit, ALL_HEADS if kind == "heads" else MOST_ROWS)
    tables = [(one, getattr(one, kind)) for one in places if getattr(one, kind) is not None]
    most = max(1, room // max(1, len(tables)))
    found: dict[str, list[int]] = {}
    totals: dict[str, int] = {}
    for one, table in tables:
        names: Sequence[str] = one.names if kind == "neurons" else [f"L{one.layer}H{h}" for h in range(table.shape[1])]
        for label, entries in _entries(names, table, most, unit).items():
            found[label] = entries
        listed = {label for group in groups for label, _ in group.rows}
        place = {label: i for i, label in enumerate(names)}
        extra = [label for label in found if label in place and label not in listed]
        sums = in_units(table.sum(0, dtype=np.float64)[[place[label] for label in extra]], unit) if extra else []
        totals |= {label: int(units) for label, units in zip(extra, sums, strict=True)}
    more: dict[str, Any] = {"places": found, "totals": totals}
    if kind == "heads":
        sources: dict[str, list[int]] = {}
        for one, table in ((one, one.sources) for one in places if one.sources is not None):
            sources |= _entries([f"L{one.layer}H{h}" for h in range(table.shape[1])], table, most, unit)
        more["sources"] = sources
    else:
        wanted = _leading_readers(readings)
        more["readings"] = {one.name: _reading(one, sheet, wanted.get(one.name, set())) for one in readings}
        more["read_from"] = _read_from(readings, unit)
        more["lead"] = _NEURONS_LEAD.format(len(readings))
    return _titled(kind, groups, more)


def _read_from(readings: Sequence[Reading], unit: float) -> dict[str, list[int]]:
    """Return what all neurons whose reading is known take from each head: how many are behind it, and the sum."""
    found: dict[str, list[float]] = {}
    for reading in readings:
        for name, share in reading.writers:
            if _HEAD.fullmatch(name):
                found.setdefault(name, []).append(share)
    return {name: [len(shares), round(math.fsum(shares) / unit)] for name, shares in found.items()}


def _entries(names: Sequence[str], table: np.ndarray, most: int, unit: float) -> dict[str, list[int]]:
    """Return the ``most`` largest entries of shares (N, M), by component: position, number, position, number, ..."""
    flat = np.abs(table).ravel()
    chosen = np.sort(np.argpartition(-flat, most - 1)[:most]) if len(flat) > most else np.arange(len(flat))
    numbers = in_units(table.ravel()[chosen], unit)
    found: dict[str, list[int]] = {}
    for place, number in zip(chosen.tolist(), numbers.tolist(), strict=True):
        position, component = divmod(place, table.shape[1])
        if number:
            found.setdefault(names[int(component)], []).extend((position, number))
    return found


def _leading_readers(readings: Sequence[Reading]) -> dict[str, set[str]]:
    """Return, by neuron, the heads of which it is one of the leading readers, so that none of these is without."""
    by_head: dict[str, list[tuple[float, str]]] = {}
    for reading in readings:
        for name, share in reading.writers:
            if _HEAD.fullmatch(name):
                by_head.setdefault(name, []).append((abs(share), reading.name))
    found: dict[str, set[str]] = {}
    for head, readers in by_head.items():
        for _, neuron in sorted(readers, reverse=True)[:READERS]:
            found.setdefault(neuron, set()).add(head)
    return found


def _reading(reading: Reading, sheet: Sheet, heads: Collection[str]) -> dict[str, Any]:
    """Return what wrote what a neuron reads, as a page holds it: the leading writers, the others, and `bias`.

    ``heads`` are listed, too.
    """
    scores = np.array([share for _, share in reading.writers])
    token = position_labels(shown_tokens(sheet.tokens))[reading.position]
    labels = [token if name == "token" else name for name, _ in reading.writers]
    also = [i for i, (name, _) in enumerate(reading.writers) if name in heads]
    kept = np.union1d(np.argsort(-np.abs(scores), kind="stable")[:WRITERS], also).astype(int)
    share = round(reading.share / sheet.unit)
    gone = float(scores.sum() - scores[kept].sum())
    numbers = apportioned(np.array([*scores[kept], gone, reading.bias]), sheet.unit, share).tolist()
    return {
        "position": reading.position,
        "share": share,
        "writers": [[labels[i], number] for i, number in zip(kept.tolist(), numbers, strict=False)],
        "others": [len(scores) - len(kept), numbers[-2]],
        "bias": numbers[-1],
    }
