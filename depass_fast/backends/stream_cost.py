"""The cost model of the streaming backend (:mod:`.stream`), from sizes alone.

It mirrors the blocks that pass through the device and the statistics that are gathered. Whoever changes one of these
buffers changes its line here.
"""

from __future__ import annotations

from .torch import cost as torch_cost
from .workload import Need, Workload


def needs(work: Workload) -> Need:
    """Return what streaming needs. On a CPU the host's memory is the device's."""
    held = work.held()
    host = 0 if work.on_cpu else held
    met = coefficients(work) if work.linear_rule else statistics(work)
    beside = met + held - host + work.activations() + torch_cost.folded_weights(work) + work.shared_values()
    again = 0 if work.linear_rule else gates_again(work)
    return Need(work.flop + again, workspace(work), beside, host)


def sharded(work: Workload, streams: bool) -> Need:
    """Return what a rank needs for its part of a state, which lies on the device unless it ``streams``.

    The statistics are held once more while they become those of all ranks, and so are sums of states. A state of which
    the rank keeps a part is there before anything else is.
    """
    need, on_device = needs(work), not streams or work.on_cpu
    merging = 0 if work.linear_rule else 2 * work.positions * work.neurons * max(work.item, 4)
    beside = need.beside + merging + 2 * work.positions * work.width * 4
    start = work.made + work.state_bytes
    if on_device:
        return Need(need.flop, need.workspace, max(beside + need.host, start - need.workspace))
    return Need(need.flop, need.workspace, beside, max(need.host, start))


def workspace(work: Workload) -> int:
    """Bytes of a block's rows, four times over or five, and of its gates in parts."""
    if not work.passed:
        return 0
    columns = 1 + max(size.ways_in for size in work.passed)
    slots = work.budget // (2 * (work.width + columns * min(work.neurons, 512)) * work.item)
    slots = min(max(slots, work.longest), work.longest * max(work.counts))
    arrays = 3 if work.linear_rule else 6
    gates = min(arrays * work.budget // 8, arrays * slots * work.neurons * 4)
    rows = 4 + any(size.source is not None for size in work.passed)  # values may be read from another state's
    return max(torch_cost.workspace(work), rows * slots * work.width * work.state_item + gates)


def statistics(work: Workload) -> int:
    """Bytes of what is kept of all components at one MLP: for most rules two numbers per position and neuron.

    The same of one prompt comes once more, as it was before a block.
    """
    return 2 * (work.positions + work.longest) * work.neurons * max(work.item, 4)


def coefficients(work: Workload) -> int:
    """Bytes of a linear rule's coefficients: a block has all positions of its prompt, and its gates come later."""
    held = torch_cost.division(work).positions
    return work.coefficients(lambda neurons: max(work.longest, held(neurons)), making=False)


def gates_again(work: Workload) -> float:
    """FLOP that streaming adds where components compete: the gates are computed in both passes."""
    return sum(size.gates(work.width, work.rows) for size in work.passed)
