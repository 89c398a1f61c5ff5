"""All start layers in one sweep: several decompositions of one trace carried through the layers together.

They share the trace and every weight: at a layer, the rows of all that have started before go
through one step of the backend, each with its own softmax. A joint state orders rows by position, then by
decomposition: attention, to which it is all the same where a component belongs, sees one wide decomposition, the MLP a
segment per position and decomposition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..adapters import Adapter, Layer
from ..runtime.memory import available
from ..runtime.progress import progress_bar
from ..state.layout import Layout
from ..state.state import ComponentState
from ..trace.record import LayerTrace, Trace
from .layer import through_attention, through_mlp
from .run import Run

JOINT_BYTES = 1 << 30  # of states that are carried together, at most


def can_propagate_jointly(trace: Trace, run: Run) -> bool:
    """True if states can be carried together: a backend for jagged rows on the device, and no values are clamped."""
    clamped = any(layer.attention.value_ratio is not None for layer in trace.layers)
    return run.backend.jagged and not run.backend.streams and not clamped


@dataclass(frozen=True)
class PendingState:
    """A decomposition that enters ``layer``: a state of ``nbytes`` on ``device``, once it is made."""

    layer: int
    nbytes: int
    device: torch.device
    make: Callable[[], ComponentState]

    @staticmethod
    def of(state: ComponentState) -> PendingState:
        """With a state that is there already."""
        return PendingState(state.layer, state.nbytes, state.device, lambda: state)


def group_by_memory(starts: Iterable[PendingState]) -> Iterator[list[PendingState]]:
    """Neighbours, as many as fit into memory together with two copies."""
    group: list[PendingState] = []
    free: dict[torch.device, int | None] = {}  # before any of the group is made
    for start in starts:
        group.append(start)
        if start.device not in free:
            free[start.device] = available(start.device)
        limit = JOINT_BYTES
        if free[start.device] is not None:
            beside = sum(other.nbytes for other in group if other.device == start.device)
            limit = min(JOINT_BYTES, (free[start.device] - beside) // 8)
        if sum(other.nbytes for other in group) + start.nbytes > limit:
            yield group
            group, free = [], {}
    if group:
        yield group


def propagate_jointly(
    adapter: Adapter,
    trace: Trace,
    starts: Sequence[PendingState],
    end: int,
    run: Run,
    reads: Sequence[Sequence[int]] | None = None,
) -> list[tuple[ComponentState, list[Tensor]]]:
    """Carry every state to the input of layer ``end``, as `DePass.propagate` does one.

    ``starts`` must be in the order of their layers, of components that live everywhere, and agree in their extras. Each
    is made when the sweep has come to its layer: a GPU is then at work on earlier ones, and has no use for it before.
    Returned are, in that order, the states (at ``reads`` of every prompt, if given) and their completeness errors at
    the start and after every layer, which may still lie on the device.
    """
    run.watch(trace, reads)
    reads = None if reads is None else [np.array(r) for r in reads]
    errors: list[list[Tensor]] = []  # of all that have started
    joint: ComponentState | None = None
    with progress_bar("layers", end - starts[0].layer, run.progress) as shown:
        for index in range(starts[0].layer, end):
            layer, record, kept = adapter.layer(index), trace.layers[index], reads if index == end - 1 else None
            under_way = [] if joint is None else [joint.moved()]
            under_way += _made(trace, run, (s for s in starts[len(errors) :] if s.layer == index), errors)
            joint, source = _through_attention(under_way, trace.offsets, layer, record, run, kept)
            joint = through_mlp(joint, source, layer, record, run)
            del source  # before the next layer makes another one
            worst = joint.completeness(trace.resid(index + 1)).view(len(errors), -1)  # (d, P)
            for mine, error in zip(errors, worst.unbind(), strict=True):
                mine.append(error)
            if shown is not None:
                shown.finish()
    done = [] if joint is None else joint.apart()
    for state in _made(trace, run, starts[len(errors) :], errors):  # they start where the sweep ends
        done.append(state if reads is None else state.at(_at(state.layout, trace.offsets, reads)))
    return list(zip(done, errors, strict=True))


def _made(trace: Trace, run: Run, starts: Iterable[PendingState], errors: list[list[Tensor]]) -> list[ComponentState]:
    """The states, with a list for each in ``errors`` that begins with its completeness error."""
    states = [run.backend.prepare(start.device, start.make) for start in starts]
    errors += [[state.completeness(trace.resid_at(state.layer, state.site))] for state in states]
    return states


def _through_attention(
    states: list[ComponentState],
    offsets: np.ndarray,
    layer: Layer,
    record: LayerTrace,
    run: Run,
    reads: Sequence[np.ndarray] | None,
) -> tuple[ComponentState, ComponentState | None]:
    """All ``states`` after the attention of a layer (at ``reads``, if given), as one, and what the MLP reads or None.

    They are used up, and the list emptied: rows that went into a copy can go.
    """
    parts, sources = [], []
    while states:
        state = states.pop(0)
        state.rows = state.rows.to(layer.device)
        queries = None if reads is None else _at(state.layout, offsets, reads)
        after, source = through_attention(state.moved(), layer, record, run, queries)
        parts.append(after)
        sources += [] if source is None else [source]
        del after, source
    joint = ComponentState.join(parts)
    parts.clear()
    return joint, ComponentState.join(sources) if sources else None


def _at(layout: Layout, offsets: np.ndarray, reads: Sequence[np.ndarray]) -> Layout:
    """A layout, joint or not, at some positions of every prompt."""
    parts = [Layout.of(part.components, offsets, list(reads)) for part in layout.apart()]
    return parts[0] if len(parts) == 1 else Layout.join(parts)
