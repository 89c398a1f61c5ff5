"""The cost model of the reference backend (:mod:`.reference`), from sizes alone: dense blocks of one prompt."""

from __future__ import annotations

from .torch.cost import folded_weights
from .workload import Need, Workload


def needs(work: Workload) -> Need:
    """Return what the reference needs: components take part in the arithmetic before they are born, too."""
    dense = sum(n * m for n, m in zip(work.lengths, work.counts, strict=True)) / max(1, work.rows)
    beside = work.activations() + folded_weights(work) + work.coefficients(lambda neurons: work.longest)
    return Need(work.flop * dense, workspace(work), work.state_bytes + beside)


def workspace(work: Workload) -> int:
    """Bytes of dense blocks of one prompt, several of which are held at a time."""
    if not work.passed:
        return 0
    attention = max(4 * size.read * work.width + 3 * size.o for size in work.passed)
    mlp = max(3 * work.width + 6 * size.neurons for size in work.passed)
    return work.longest * max(work.counts) * max(attention, mlp) * work.state_item
