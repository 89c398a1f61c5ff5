"""A graph as a page: its sheet, and the view that draws it (docs/report.md).

The numbers of a node's incoming edges are whole multiples of a unit of its own, so that they add up without rounding.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ..labels import position_labels, shown_tokens
from ..report.sheet import FROZEN, Sheet, tokens_view
from ..report.units import Group, group_of, in_units, leading, unit_of
from ..results.render import VALUES
from .influence import BIAS, OTHERS, Matrix, influence, leading_paths, without
from .layout import laid_out
from .record import DirectShares, Place

NODES, TOKENS, EDGES, PATHS = (
    1_000,
    200,
    80_000,
    10,
)  # that a page holds at most, so that it stays below three megabytes
_LISTED = 400  # edges into the target that are named
_LEAD = (
    "Who reads from whom. A line is what a node takes directly from another one; all that come into a node sum to its "
    "activation. Choose a node to see both."
)


def sheet_of(graph: DirectShares) -> Sheet:
    """Return the sheet of a graph, with the shares of the tokens in front of its view."""
    largest = max(
        abs(float(graph.activations[0])), *(abs(place.share) for place in (*graph.token_places, *graph.seats))
    )
    what, value = VALUES[graph.target_kind], float(graph.activations[0])
    at = f"position {graph.position} (after {shown_tokens(graph.tokens)[graph.position]!r})"
    sheet = Sheet(
        name=f"graph of {graph.target_name} at position {graph.position}",
        headline=f"{graph.target_name} at {at}: {what} {value:.4f}",
        target=graph.target_name,
        what=what,
        value=value,
        unit=unit_of(largest),
        error=graph.completeness_error,
        exact=True,
        about=f"direct shares under the linear rule {graph.rule!r}: exact | completeness error "
        f"{graph.completeness_error:.1e} | {graph.seconds:.2f} s",
        tokens=graph.tokens,
        position=graph.position,
        warnings=list(graph.warnings),
        notes=[FROZEN],
        made_with=graph.provenance.told(),
    )
    shares = np.array([place.share for place in graph.token_places])
    every = np.arange(len(shares))
    tokens = group_of(position_labels(shown_tokens(graph.tokens)), shares, sheet.unit, every, bias=graph.constants)
    sheet.views = [tokens_view(tokens, every.tolist()), view_of(graph, sheet.unit)]
    return sheet


def view_of(graph: DirectShares, unit: float) -> dict[str, Any]:
    """Return the view of a graph, whose shares in the target are in ``unit``.

    ``nodes`` are the target, the tokens and the other nodes, each [id, kind, layer, position, share, influence, x, y].
    ``reads`` are the edges into the target and into the other nodes, from node number ``first`` on. ``groups`` holds
    those into the target with their names, as a table has them.
    """
    given, graph = len(graph.seats), _bounded(graph)
    found = influence(graph.shares, len(graph.tokens))
    tokens = _tokens(graph, found.columns[: len(graph.tokens)])
    columns = np.concatenate([tokens, np.arange(len(graph.tokens), graph.shares.shape[1] + OTHERS)])
    places: list[Place] = [*(graph.token_places[i] for i in tokens), *graph.seats]
    at, drawn = laid_out(places)
    center = next(center for position, center, _ in drawn if position == graph.position)
    number = in_units([place.share for place in places], unit).tolist()
    nodes: list[list[Any]] = [["target", "target", None, graph.position, None, 1.0, center, graph.n_layers + 0.2]]
    for place, share, column, (x, y) in zip(places, number, columns.tolist(), at, strict=True):
        size = round(float(found.columns[column]), 5)
        nodes.append([place.id, place.kind, place.layer, place.position, share, size, x, y])
    nodes[0][4] = round(float(graph.activations[0]) / unit)
    kept = _kept(graph.shares[:, columns], found.rows, np.abs(graph.shares).sum(1))
    reads = [_reads(graph, row, columns, kept[row]) for row in range(len(graph.shares))]
    names = [*position_labels(shown_tokens(graph.tokens)), *(seat.id for seat in graph.seats), "others of target"]
    into = np.flatnonzero(graph.shares[0, :BIAS])
    scores = graph.shares[0, into]
    listed = leading(np.abs(scores), _LISTED, 0.999)
    group = group_of([names[i] for i in into], scores, unit, listed, bias=float(graph.shares[0, BIAS]))
    return {
        "kind": "graph",
        "id": "graph",
        "title": "Graph",
        "lead": _LEAD,
        "listed": "What the target reads directly",
        "groups": [group.plain()],
        "nodes": nodes,
        "first": 1 + len(tokens),
        "columns": drawn,
        "layers": graph.n_layers,
        "reads": reads,
        "paths": _paths(graph, columns),
        "about": f"rule {graph.rule}; sums of edges are off by at most {graph.completeness_error:.1e} of their sizes",
        "left": [given - len(graph.seats), len(graph.tokens) - len(tokens)],
        "edges": int(np.count_nonzero(graph.shares)),
    }


def _paths(graph: DirectShares, columns: np.ndarray) -> list[tuple[list[int], float]]:
    """Return the leading paths: the numbers of their nodes, from a token to the target, and their strength."""
    number = {column: 1 + i for i, column in enumerate(columns.tolist())}
    found = leading_paths(graph.shares, len(graph.tokens), PATHS)
    return [
        ([*(number[column] for column in path), 0], float(f"{strength:.4g}"))
        for strength, path in found
        if all(column in number for column in path)
    ]


def _bounded(graph: DirectShares) -> DirectShares:
    """Return the graph with the nodes of the largest influence alone, as many as a page holds."""
    if len(graph.seats) <= NODES:
        return graph
    n_tokens = len(graph.tokens)
    sizes = influence(graph.shares, n_tokens).columns[n_tokens:OTHERS]
    keep = np.zeros(1 + len(sizes), bool)
    keep[[0, *(1 + np.argsort(-sizes, kind="stable")[:NODES])]] = True
    return replace(
        graph,
        shares=without(graph.shares, n_tokens, keep),
        activations=graph.activations[keep],
        errors=graph.errors[keep],
        seats=tuple(seat for seat, stays in zip(graph.seats, keep[1:], strict=True) if stays),
    )


def _tokens(graph: DirectShares, sizes: Matrix) -> np.ndarray:
    """Return the positions whose tokens are nodes of the page: those of other nodes, and of the largest influence."""
    chosen = {graph.position, *(seat.position for seat in graph.seats)}
    return np.union1d(np.sort(np.argsort(-sizes, kind="stable")[:TOKENS]), sorted(chosen)).astype(int)


def _kept(shares: Matrix, influences: Matrix, sizes: Matrix) -> np.ndarray:
    """Return which edges (R, S) the page holds: all that are no zeros, or those of the largest influence."""
    scores = np.abs(shares) * (influences / np.maximum(sizes, np.finfo(float).tiny))[:, None]
    if np.count_nonzero(shares) <= EDGES:
        return shares != 0
    return (shares != 0) & (scores >= np.partition(scores.ravel(), -EDGES)[-EDGES])


def _reads(graph: DirectShares, row: int, columns: np.ndarray, kept: np.ndarray) -> dict[str, Any]:
    """Return the edges into one node: [number of a node, units, ...], and all that belongs to their sum."""
    shares = graph.shares[row]
    unit = unit_of(max(abs(float(graph.activations[row])), float(np.abs(shares).max())))
    own = shares[:OTHERS]
    places = columns[kept]
    others, bias = float(shares[OTHERS]), float(shares[BIAS])
    group: Group = group_of([""] * len(own), own, unit, places, rest=others, bias=bias)
    numbers = [number for _, number in group.rows]
    pairs = np.stack([1 + np.flatnonzero(kept), np.array(numbers, dtype=np.int64)], 1)
    pairs = pairs[pairs[:, 1] != 0]
    return {
        "unit": unit,
        "from": pairs.ravel().tolist(),
        "left": [int(np.count_nonzero(own)) - int(kept.sum()), group.others[1]],
        "others": group.rest,
        "bias": group.bias,
        "total": group.total,
        "activation": float(graph.activations[row]),
        "error": float(f"{graph.errors[row]:.2e}"),
        "size": float(f"{np.abs(shares).sum():.6e}"),
    }
