"""The page of a ledger: what positions are worth at every layer, and its tokens, modules, heads and neurons."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..components.base import ComponentKind
from ..components.model import Tokens
from ..report.sheet import FROZEN, Sheet, components_view, tokens_view
from ..report.units import leading, unit_of
from ..results.html import ALL_HEADS, MOST_ROWS, AsPage, empty_sheet, groups_of, layers_of, map_row, token_group
from .given import OWN_KINDS, kinds_there

CELLS = 120_000  # of maps, that a page holds at most
_TITLES = {
    "tokens": ("All tokens", ""),
    "modules": ("Modules", "The share of every layer's whole attention and MLP."),
    "heads": ("Heads", "The share of every attention head, at all positions together."),
    "neurons": ("Neurons", "The leading neurons, at all positions together."),
    "features": ("Features", "The features of the dictionary; rest is what it misses."),
}
_LOOKING = (
    "These are shares of what the target owes to where heads look, and not evenly. Layers have sums of their own: what "
    "is owed to the heads from there on."
)


class PagedLedger(AsPage):
    """Gives :class:`depass_fast.Ledger` its page: a sheet for each prompt, position and target."""

    def page_sheets(self) -> list[Sheet]:
        """Return the sheets of the page; those of the second book follow, where there is one."""
        return list(ledger_sheets(self))

    def few_sheets(self) -> tuple[list[Sheet], int]:
        """Return the sheets that a notebook shows, and how many others there are."""
        book: Any = self
        return [next(ledger_sheets(self))], sum(map(len, book.target_names)) - 1


def ledger_sheets(ledger: Any, features: ComponentKind | None = None, notes: Sequence[str] = ()) -> Iterator[Sheet]:
    """Yield the sheets of a ledger. ``features`` are those of a dictionary; ``notes`` are said on every sheet."""
    books = [ledger, *([ledger.steered] if ledger._looking is not None and not ledger._is_steered else [])]
    count = len(books) * sum(map(len, ledger.target_names))
    for book in books:
        error = book.completeness_error
        for prompt, results, states in _answers(book, features):
            for target in range(len(results["tokens"].target_names)):
                sheet = _sheet(results, states, target, count, error)
                sheet.notes = [*sheet.notes, *notes]
                if book._is_steered:
                    sheet.own_sums = "each layer's sum is what is owed to the looking of heads from there on"
                    sheet.notes = [_LOOKING, *sheet.notes[1:]]
                    sheet.name = f"{sheet.name}, credit of attention"
                if len(ledger._request.prompts) > 1:
                    sheet.name = f"prompt {prompt + 1}: {sheet.name}"
                yield sheet


def _answers(book: Any, features: ComponentKind | None) -> Iterator[tuple[int, dict[str, Any], list[Any]]]:
    """Yield prompts, once for each read, with the answers for each kind, and those of the tokens at every layer."""
    request = book._request
    layers = range(request.end)
    kinds = {kind: OWN_KINDS[kind] for kind in kinds_there(request.adapter)}
    if features is not None:
        kinds["features"] = features
    for prompt in range(len(request.prompts)):
        states = [book._read_off(Tokens(layer), [prompt])[0] for layer in layers]
        found = {kind: book._read_off(one, [prompt])[0] for kind, one in kinds.items()}
        for read in range(book.n_reads):
            yield prompt, {kind: one[read] for kind, one in found.items()}, [one[read] for one in states]


def sheet_of(results: dict[str, Any], target: int, error: float, others: Sequence[Any] = ()) -> Sheet:
    """Return the sheet of the answers of a ledger without its views; ``others`` are answers that have views, too.

    ``error`` is the ledger's completeness error, which is that of all sites, also of those without a view.
    """
    tokens = results["tokens"]
    every = [one for result in (*results.values(), *others) for one in layers_of(result)]
    largest = max(float(one.scores_of(target).abs().max()) for one in every)
    sheet = empty_sheet(tokens, target, "", unit_of(max(largest, abs(float(tokens.target_logits.reshape(-1)[target])))))
    sheet.error = error
    sheet.about = (
        f"one forward and one backward pass under the linear rule {tokens.allocation!r}: exact | "
        f"{tokens.backend} on {tokens.device}, {tokens.dtype} | completeness error {error:.1e}: how far a sum is off "
        "at most, anywhere in the network, relative to the sizes of its parts"
    )
    sheet.notes = [
        FROZEN,
        f"An MLP's output is shared out by the rule {tokens.allocation!r}; another rule is another split.",
        "A share holds all that later layers make of a component: shares of different layers are not to be added.",
    ]
    return sheet


def _sheet(results: dict[str, Any], states: Sequence[Any], target: int, count: int, error: float) -> Sheet:
    """Return one of ``count`` sheets, which share the room of a page."""
    sheet = sheet_of(results, target, error, states)
    group, positions = token_group(results["tokens"], target, sheet.unit)
    sheet.views = [tokens_view(group, positions), _map(states, target, len(positions), sheet.unit, count)]
    for kind in ("modules", "heads", "neurons", "features"):
        if kind in results:
            most = ALL_HEADS if kind in ("modules", "heads") else max(24, MOST_ROWS // count)
            groups = groups_of(layers_of(results[kind]), target, sheet.unit, most)
            title, lead = _TITLES[kind]
            sheet.views.append(components_view(kind, title, groups, {"lead": lead}))
    groups = groups_of([results["tokens"]], target, sheet.unit, MOST_ROWS)
    sheet.views.append(components_view("tokens", _TITLES["tokens"][0], groups))
    return sheet


def _map(states: Sequence[Any], target: int, n: int, unit: float, count: int) -> dict[str, Any]:
    """Return the view of layers by positions: what the state of each position is worth at a layer's input."""
    cells = [one.scores_of(target)[:n].double().cpu().numpy() for one in states]
    sizes = np.sum([np.abs(row) for row in cells], 0)
    kept = leading(sizes, max(64, CELLS // count // len(cells)), 0.9999)
    rows = [map_row(one, target, row, kept, unit) for one, row in zip(states, cells, strict=True)]
    return {
        "kind": "map",
        "id": "map",
        "title": "Layers and positions",
        "lead": "What the state of every position is worth at the input of a layer. Choose a cell to see the layer.",
        "what": "what every position is worth at the layer's input",
        "positions": kept.tolist(),
        "left": len(sizes) - len(kept),
        "parts": [{"name": "state", "title": "State", "rows": rows}],
    }
