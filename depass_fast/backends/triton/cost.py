"""The cost model of the triton backend, from sizes alone and without Triton.

It mirrors what :mod:`.backend` puts into its arena, cut as :mod:`.arena` says. Whoever changes one of these buffers
changes its line here. The last layer's few queries are the torch backend's, and so are their bytes.
"""

from __future__ import annotations

from ..torch.cost import queries
from ..workload import Need, Workload
from .arena import Arena


def needs(work: Workload, joining: bool = False) -> Need:
    """Return what the triton backend needs; ``joining``: one more state joins the one that is carried."""
    return Need(work.flop, workspace(work), work.held_on_device(joining) + cast_weights(work))


def workspace(work: Workload) -> int:
    """Bytes of the arena, or of what the last layer's few queries take."""
    if not work.passed:
        return 0
    last = work.passed[-1]
    return max(arena_bytes(work), queries(work, last) + last.v * work.width * work.item)


def arena_bytes(work: Workload) -> int:
    """Bytes of the arena, in which attention and MLP take turns."""
    arena, most = Arena(work.budget, work.item, work.state_item), 0
    for size in work.passed:
        most = max(most, arena.attention_bytes(work.rows, work.longest, work.width, size.v, size.o))
        for neurons, share in size.mlps:
            rows = work.sent_rows(share)
            most = max(most, arena.mlp_bytes(rows, max(work.counts), neurons, work.width))
    return most


def cast_weights(work: Workload) -> int:
    """Bytes of one branch's weights that have to change their dtype: norms are applied to rows, not folded."""
    pairs = [pair for size in work.passed for pair in ((size.v, size.o), *((n, n) for n, _ in size.mlps))]
    normed = any(size.output_norms for size in work.passed)
    most = max((own * work.casts + out * (work.casts or normed) for own, out in pairs), default=0)
    return work.width * most * work.item
