"""Influence through a graph, pruning by it, and the paths that carry most of it, on a matrix of direct shares.

A matrix (R, S) has the node that reads in its rows: the target first, then the seats, those that read last first. Its
columns are T tokens, the seats in the same order, `others` and `bias`. So a seat's readers are always in rows above its
own, and one pass over the rows follows every path.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
OTHERS, BIAS = -2, -1  # columns


class Influence(NamedTuple):
    """The fraction of the target's influence that passes a node: rows (R,), columns (S,), `others` of each row (R,)."""

    rows: Matrix
    columns: Matrix
    others: Matrix


def fractions(shares: Matrix) -> Matrix:
    """Return |share| as a fraction of all that a row reads: (R, S)."""
    size = np.abs(shares)
    return size / np.maximum(size.sum(1, keepdims=True), np.finfo(float).tiny)


def influence(shares: Matrix, n_tokens: int) -> Influence:
    """Return the influence of every node on the target: the sum over all paths of the products of fractions.

    It is what circuit-tracer computes as Σ_k Aᵏ, A the matrix of fractions, for one target.
    """
    parts = fractions(shares)
    rows, columns = np.zeros(len(parts)), np.zeros(parts.shape[1])
    rows[0] = 1.0
    for row, part in enumerate(parts):
        if row:
            rows[row] = columns[n_tokens + row - 1]
        columns += rows[row] * part
    return Influence(rows, columns, rows * parts[:, OTHERS])


def pruned(
    shares: Matrix, n_tokens: int, node_threshold: float, edge_threshold: float
) -> tuple[Matrix, NDArray[np.bool_]]:
    """Return a matrix (R', S') without the nodes and edges of little influence, and the rows that are kept (R,).

    Nodes are kept until their influence adds up to ``node_threshold`` of that of all nodes, then edges to
    ``edge_threshold``. Tokens, `bias` and `others` stay. What is cut is in `others` of the row that it was read by, so
    that the sums of rows stay as they are.
    """
    found = influence(shares, n_tokens)
    seats = found.columns[n_tokens:OTHERS]
    every = np.concatenate([found.columns[:n_tokens], seats, found.others, found.columns[BIAS:]])
    keep = np.concatenate([[True], seats >= _threshold(every, node_threshold)])
    cut = without(shares, n_tokens, keep)
    found = influence(cut, n_tokens)
    edges = fractions(cut) * found.rows[:, None]
    kept_edges = edges >= _threshold(edges.ravel(), edge_threshold)
    kept_edges[:, [OTHERS, BIAS]] = True
    cut[:, OTHERS] += np.where(kept_edges, 0.0, cut).sum(1)
    cut = np.where(kept_edges, cut, 0.0)
    numbers = np.flatnonzero(keep)
    while True:  # a node that nobody reads any more is none; one that is gone may have been the only reader of others
        read = (cut[:, n_tokens:OTHERS] != 0).any(0)
        if read.all():
            break
        stay = np.concatenate([[True], read])
        numbers, cut = numbers[stay], without(cut, n_tokens, stay)
    kept = np.zeros(len(shares), bool)
    kept[numbers] = True
    return cut, kept


def without(shares: Matrix, n_tokens: int, keep: NDArray[np.bool_]) -> Matrix:
    """Return the matrix of the rows to ``keep`` (R,), the target among them; what the others give is in `others`."""
    rows = shares[keep].copy()
    columns = np.concatenate([np.ones(n_tokens, bool), keep[1:], [True, True]])
    rows[:, OTHERS] += np.where(columns, 0.0, rows).sum(1)
    return rows[:, columns]


def _threshold(scores: Matrix, threshold: float) -> float:
    """Return the smallest score of those that add up to the ``threshold`` of all, the largest first."""
    ordered = np.sort(scores)[::-1]
    reached = np.cumsum(ordered) / max(ordered.sum(), np.finfo(float).tiny)
    return float(ordered[min(int(np.searchsorted(reached, threshold)), len(ordered) - 1)])


def cumulative(scores: Matrix) -> Matrix:
    """Return the share of all scores that a score and the larger ones add up to, as viewers prune by it."""
    order = np.argsort(-scores, kind="stable")
    found = np.empty_like(scores)
    found[order] = np.cumsum(scores[order]) / max(scores.sum(), np.finfo(float).tiny)
    return found


def leading_paths(shares: Matrix, n_tokens: int, count: int) -> list[tuple[float, list[int]]]:
    """Return the ``count`` paths from a token to the target with the largest products of fractions.

    Each is (product, columns), the token first; the last column is that of what the target reads.
    """
    parts = fractions(shares)[:, :OTHERS]
    best = np.zeros(parts.shape[1])  # of the ways from a token to a column's node
    best[:n_tokens] = 1.0
    for row in reversed(range(1, len(parts))):
        best[n_tokens + row - 1] = (parts[row] * best).max(initial=0.0)
    heap, found = [(-float((parts[0] * best).max(initial=0.0)), 1.0, 0, [])], []
    while heap and len(found) < count:
        bound, product, row, behind = heapq.heappop(heap)
        if not bound:
            break
        if row < 0:
            found.append((product, behind))
            continue
        for column in np.flatnonzero(parts[row] * best):
            passed = product * float(parts[row, column])
            place = int(column)
            node = -1 if place < n_tokens else place - n_tokens + 1
            heapq.heappush(heap, (-passed * float(best[place]), passed, node, [place, *behind]))
    return found
