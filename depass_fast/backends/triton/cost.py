"""The cost model of the triton backend, from sizes alone and without Triton.

It mirrors what :mod:`.backend` puts into its arena, cut as :mod:`.arena` says. Whoever changes one of these buffers
changes its line here. The last layer's few queries are the torch backend's, and so are their bytes.
"""

from __future__ import annotations

from dataclasses import replace

from ..torch.cost import attention_alone, queries
from ..workload import Need, Workload
from .arena import Arena


def needs(work: Workload, joining: bool = False) -> Need:
    """Return what the triton backend needs; ``joining``: one more state joins the one that is carried."""
    arena = Arena(work.budget, work.item, work.state_item)
    beside = work.coefficients(arena.positions) + cast_weights(work) + work.gathered() + work.shared_values()
    return Need(work.flop, workspace(work), work.held_on_device(joining) + beside)


def workspace(work: Workload) -> int:
    """Bytes of the arena and of the probabilities beside it, or of what the last layer's few queries take instead.

    Attention that there is no kernel for has buffers of its own.
    """
    if not work.passed:
        return 0
    last = work.passed[-1]
    few, weights = work, last.read * last.v
    if work.float16:  # the products for few queries are then in the state's dtype
        few, weights = replace(work, item=work.state_item), last.read * last.v + last.o
    instead = queries(few, last) + weights * work.width * few.item - cast_weights(work)
    return max(arena_bytes(work) + probability_bytes(work) + attention_alone(work), instead)


def arena_bytes(work: Workload) -> int:
    """Bytes of the arena, in which attention and MLP take turns."""
    arena, most = Arena(work.budget, work.item, work.state_item), 0
    for size in work.passed:
        most = max(most, arena.attention_bytes(work.rows, work.longest, size.read * work.width, size.v, size.o))
        for neurons, share in size.mlps:
            rows = work.sent_rows(share)
            if work.linear_rule:
                rows = min(rows, work.rows_at(arena.positions(neurons)))
            most = max(most, arena.mlp_bytes(rows, max(work.counts), neurons, work.width, size.ways_in))
    return most


def probability_bytes(work: Workload) -> int:
    """Bytes of a layer's probabilities where they are stored."""
    arena = Arena(work.budget, work.item, work.state_item)
    passed = [size for size in work.passed if not (size.skip_attention or size.kernelless)]
    each = [(work.positions, size.heads, work.longest) for size in passed]
    return max((arena.probabilities(*one) for one in each if arena.stores(*one)), default=0)


def cast_weights(work: Workload) -> int:
    """Bytes of one branch's weights that have to change their dtype: norms are applied to rows, not folded."""
    normed, most = any(size.output_norms for size in work.passed), 0
    for size in work.passed:
        half = work.float16_by_default  # under a linear rule the MLP is not in float16
        pairs = [
            (size.read * size.v, size.o, half),
            *((size.ways_in * n, n, half and not work.linear_rule) for n, _ in size.mlps),
        ]
        for own, out, in_float16 in pairs:
            casts = work.casts or in_float16
            most = max(most, own * casts + out * (casts or normed))
    return work.width * most * work.item
