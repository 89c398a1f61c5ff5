"""The cost model of the torch backend: bytes of the buffers that its neighbours hold, from sizes alone.

It mirrors the blocks of :mod:`.attention`, the chunks of :mod:`.mlp`, the tiles of P and the weights that
:mod:`.backend` prepares for a layer, cut as :mod:`.division` says. Whoever changes one of these buffers changes its
line here; ``tests/planning/test_plan.py`` and ``python -m bench.memory.plan`` compare.
"""

from __future__ import annotations

from ...trace.mixing import LONGEST_MATRIX, MATRIX
from ...trace.scan import CHUNK, SCANNED, SCANNED_CUDA, SCANS
from ..workload import LayerSize, Need, Workload
from .division import TARGET_NEURONS, Division

_TAPS, _LOOKS, _STATES = 4, 2, 4  # times that probabilities are held beside themselves, and a recurrence's states


def needs(work: Workload, joining: bool = False) -> Need:
    """Return what the torch backend needs; ``joining``: one more state joins the one that is carried."""
    beside = work.coefficients(division(work).positions) + folded_weights(work) + work.shared_values()
    beside += max(work.gathered(), recurrences(work) - _tiles(work) * work.on_cpu)  # one after the other
    return Need(work.flop, workspace(work), work.held_on_device(joining) + beside)


def workspace(work: Workload) -> int:
    """Bytes of buffers for blocks of attention and chunks of the MLP, and of tiles of P."""
    if not work.passed:
        return 0
    return _workspace_on_a_cpu(work) if work.on_cpu else _workspace_on_a_gpu(work)


def _workspace_on_a_cpu(work: Workload) -> int:
    attention = max(
        work.width * (size.read + (size.source is not None)) + 2 * (size.o + size.v) for size in work.passed
    )
    mlp = max(work.width + size.ways_in * min(size.neurons, TARGET_NEURONS) for size in work.passed)
    rows = min(work.rows, work.budget // (2 * min(attention, mlp) * work.item) + work.longest)
    return min(work.budget, rows * max(attention, mlp) * work.item) + _tiles(work)


def _tiles(work: Workload) -> int:
    """Bytes of tiles of P on a CPU, and of what they are made of."""
    widest = max((size.o for size in work.passed if size.looks or not size.recurrent), default=0)
    return 3 * min(work.budget // 4, 4 * work.longest**2 * widest // 64)


def _workspace_on_a_gpu(work: Workload) -> int:
    """Buffers are kept up to the last layer; of attention and MLP, one goes into the other's where it can."""
    item, most = work.item, 0
    for size in set(work.passed):
        slots, kept, passing = _attention(work, size)
        shared = slots * max(size.v, size.o) * item
        cut = division(work, size)
        for neurons, share in set(size.mlps):
            n_rows, longest = work.sent_rows(share), max(work.counts)
            if work.linear_rule:
                n_rows = min(n_rows, work.rows_at(cut.positions(neurons)))
            n_rows = min(n_rows, max(cut.rows(work.width, neurons, n_rows, longest), longest))
            part = cut.neurons(work.width, neurons, max(1, n_rows))
            apart = 0 if part == neurons else work.width * work.state_item
            gates = n_rows * (work.width * item + apart + part * (cut.gate - item))
            most = max(most, kept + max(shared, n_rows * part * item) + gates + passing)
        most = max(most, queries(work, size))
    return most


def attention_alone(work: Workload) -> int:
    """Bytes of the attention that the triton backend leaves to this one, on a GPU: its blocks, tiles of P, and W_V."""
    left = {size for size in work.passed if size.kernelless and not size.skip_attention}
    alone = max(
        (sum(_attention(work, size)[1:]) + size.v * size.read * work.width * work.item for size in left), default=0
    )
    return alone + recurrences(work)


def recurrences(work: Workload) -> int:
    """Bytes of a recurrence's matrices while they are made, for short prompts, and of the factors of its values."""
    longest, most = work.longest, 0
    for size in set(work.passed):
        if size.recurrent and not size.skip_attention:
            has_matrices = size.heads * longest**2 <= MATRIX and longest <= LONGEST_MATRIX
            numbers = matrices(size, longest) if has_matrices else scanned(size, work.on_cpu)
            most = max(most, (numbers + _TAPS * longest * size.o) * max(4, work.item))
    return most


def matrices(size: LayerSize, positions: int) -> int:
    """Return the numbers that are held while a recurrence's matrices are made, by running over unit values."""
    state = max(min(CHUNK, positions), size.keys)  # channels of a state, or positions of a chunk
    beside = _STATES * state if size.keys and not size.looks else max(_STATES * state, _LOOKS * positions)
    return size.heads * positions * (positions + beside)


def scanned(size: LayerSize, on_cpu: bool) -> int:
    """Return the numbers of the heads that a recurrence runs over at once: keys, queries, decays, values, maps."""
    return SCANS * min(size.heads * CHUNK * max(CHUNK, size.keys), SCANNED if on_cpu else SCANNED_CUDA)


def _attention(work: Workload, size: LayerSize) -> tuple[int, int, int]:
    """The places in a block of attention, the bytes that are kept for it, and those in passing or of tiles of P.

    Where values are those of an earlier layer, the rows of two states are held; the last layer mostly has few queries.
    """
    reads = size.source is not None and not size.skip_attention and size is not work.passed[-1]
    width = work.width * size.read
    slots, alone = _block(work, division(work).slots(width, size.v, size.o))
    rows = 0 if alone else slots * work.width * work.state_item * (size.read + reads)
    passing = max(slots * width * work.item, 3 * min(work.budget // 16, 4 * work.longest**2 * size.heads))
    return slots, slots * (size.v + size.o) * work.item + rows, passing


def queries(work: Workload, size: LayerSize) -> int:
    """Bytes for few queries in the last layer: a block's rows, twice in the products' dtype, and sums of them."""
    item, width = work.item, work.width * size.read
    most = division(work).query_slots(width, size.o, size.heads, max(1, min(work.lengths)))
    slots, alone = _block(work, most)
    prompt = work.longest * max(work.counts)
    if prompt <= most:  # whole prompts, as many as fit together
        slots, alone = min(most, prompt * len(work.lengths)), True
    alive = 3 * slots // 4 if work.staggered else slots  # of a block that begins with its components' births
    rows = (0 if alone else alive * width * work.state_item) + alive * width * item
    sums = slots // work.longest * (size.heads * width + 2 * size.o) * item
    read = sum(work.counts) * work.width * work.state_item  # what the layer makes of one position
    return rows + work.staggered * slots * width * item + sums + read


def folded_weights(work: Workload) -> int:
    """Bytes of one layer's weights with a norm folded into them, and of those that have to change their dtype."""
    folded = max((size.v * size.read + size.ways_in * size.neurons for size in work.passed), default=0)
    changed = max((max(size.o, size.neurons) * (work.casts or size.output_norms) for size in work.passed), default=0)
    return work.width * (folded + changed) * work.item


def division(work: Workload, size: LayerSize | None = None) -> Division:
    """The division of the workspace, for the MLP of a layer of some ``size``."""
    ways_in = size.ways_in if size is not None and work.linear_rule else None
    return Division(work.budget, work.item, work.state_item, work.on_cpu, ways_in)


def _block(work: Workload, slots: int) -> tuple[int, bool]:
    """Places in a block of attention for so many ``slots``, and True if that is all of the longest prompt."""
    most = max(work.counts)
    together = min(most, max(64, work.longest // 4)) if work.staggered else most
    return min(max(slots, work.longest), work.longest * together), together == most <= slots // work.longest
