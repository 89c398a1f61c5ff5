"""The cost model of the triton backend, from sizes alone and without Triton.

It mirrors what :mod:`.backend` puts into its arena, cut as :mod:`.arena` says. Whoever changes one of these buffers
changes its line here. The last layer's few queries are the torch backend's, and so are their bytes.
"""

from __future__ import annotations

from dataclasses import replace

from ..torch.cost import queries
from ..workload import Need, Workload
from .arena import Arena


def needs(work: Workload, joining: bool = False) -> Need:
    """Return what the triton backend needs; ``joining``: one more state joins the one that is carried."""
    return Need(work.flop, workspace(work), work.held_on_device(joining) + cast_weights(work) + work.gathered())


def workspace(work: Workload) -> int:
    """Bytes of the arena and of the probabilities beside it, or of what the last layer's few queries take instead."""
    if not work.passed:
        return 0
    last = work.passed[-1]
    few, weights = work, last.v
    if work.float16:  # the products for few queries are then in the state's dtype
        few, weights = replace(work, item=work.state_item), last.v + last.o
    instead = queries(few, last) + weights * work.width * few.item - cast_weights(work)
    return max(arena_bytes(work) + probability_bytes(work), instead)


def arena_bytes(work: Workload) -> int:
    """Bytes of the arena, in which attention and MLP take turns."""
    arena, most = Arena(work.budget, work.item, work.state_item), 0
    for size in work.passed:
        most = max(most, arena.attention_bytes(work.rows, work.longest, work.width, size.v, size.o))
        for neurons, share in size.mlps:
            rows = work.sent_rows(share)
            most = max(most, arena.mlp_bytes(rows, max(work.counts), neurons, work.width))
    return most


def probability_bytes(work: Workload) -> int:
    """Bytes of a layer's probabilities where they are stored."""
    arena = Arena(work.budget, work.item, work.state_item)
    each = [(work.positions, size.heads, work.longest) for size in work.passed if not size.skip_attention]
    return max((arena.probabilities(*one) for one in each if arena.stores(*one)), default=0)


def cast_weights(work: Workload) -> int:
    """Bytes of one branch's weights that have to change their dtype: norms are applied to rows, not folded."""
    pairs = [pair for size in work.passed for pair in ((size.v, size.o), *((n, n) for n, _ in size.mlps))]
    normed, casts = any(size.output_norms for size in work.passed), work.casts or work.float16_by_default
    most = max((own * casts + out * (casts or normed) for own, out in pairs), default=0)
    return work.width * most * work.item
