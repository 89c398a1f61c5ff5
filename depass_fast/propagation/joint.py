"""Several decompositions of one trace, which start at different layers and are carried through the layers together.

They share the trace and every weight: at a layer, the rows of all decompositions that have started go through one step
of the backend, each with its own softmax. A joint state orders rows by position, then by decomposition. Attention
treats all components alike and sees one wide decomposition; the MLP sees a segment per position and decomposition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..adapters import Adapter, Layer
from ..runtime.memory import available
from ..runtime.precision import full_precision
from ..runtime.progress import progress_bar
from ..state.completeness import Completeness
from ..state.state import ComponentState
from ..trace.record import LayerTrace, Trace
from .layer import through_attention, through_mlp
from .run import Run

JOINT_BYTES = 1 << 30  # upper limit of the states that are carried together


def can_propagate_jointly(trace: Trace, run: Run) -> bool:
    """True if states can be carried together.

    Rows are jagged, there is one stream, no values are clamped, nothing is read twice or carried to later positions.
    """
    each = [layer.attention for layer in trace.layers if layer.attention is not None]
    clamped = any(one.value_ratio is not None and not one.is_mixed for one in each)
    taken = any(one.source is not None for layer in trace.layers for one in (layer.attention, *layer.mlps) if one)
    taken = taken or any(layer.streams is not None for layer in trace.layers)
    taken = taken or any(layer.spreads for layer in trace.layers)
    taken = taken or any(part.out_ratio is not None for layer in trace.layers for part in layer.mlps)
    return run.backend.jagged and run.backend.joins and not (clamped or taken) and run.value_rule is None


@dataclass(frozen=True)
class PendingState:
    """A decomposition that enters ``layer``. ``make`` makes its state, of ``nbytes`` on ``device``."""

    layer: int
    nbytes: int
    device: torch.device
    make: Callable[[], ComponentState]

    @staticmethod
    def of(state: ComponentState) -> PendingState:
        """Return a pending state that is there already."""
        return PendingState(state.layer, state.nbytes, state.device, lambda: state)


def group_by_memory(starts: Iterable[PendingState]) -> Iterator[list[PendingState]]:
    """Group neighbours, as many as fit into memory together with two copies."""
    group: list[PendingState] = []
    free: dict[torch.device, int | None] = {}  # before any of the group is made
    for start in starts:
        group.append(start)
        if start.device not in free:
            free[start.device] = available(start.device)
        limit, free_here = JOINT_BYTES, free[start.device]
        if free_here is not None:
            beside = sum(other.nbytes for other in group if other.device == start.device)
            limit = min(JOINT_BYTES, (free_here - beside) // 8)
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
    """Carry every state to the input of layer ``end``, as :func:`depass_fast.propagation.loop.propagate` carries one.

    Arguments as of :func:`carry_jointly`.

    Returns:
        for each start, in that order: the state, at ``reads`` of every prompt if given; its completeness errors.
    """
    done, errors = carry_jointly(adapter, trace, starts, end, run, reads)
    return list(zip([one for state in done for one in state.apart()], errors, strict=True))


@full_precision()
def carry_jointly(
    adapter: Adapter,
    trace: Trace,
    starts: Sequence[PendingState],
    end: int,
    run: Run,
    reads: Sequence[Sequence[int]] | None = None,
) -> tuple[list[ComponentState], list[list[Tensor]]]:
    """Carry every state to the input of layer ``end``, all that have started as one joint state.

    ``starts`` must be in the order of their layers, hold components that live everywhere, and agree in their extras. A
    state is made when the sweep reaches its layer: until then it would only take memory.

    Returns:
        the joint state and those that start at the end, at ``reads`` of every prompt if given, in the order of
        ``starts``; the completeness errors of each start, (P,) each, at the start and after every layer, which may
        still lie on the device.
    """
    run.watch(trace, reads)
    run.backend.begin(adapter, trace, starts[0].layer, end)
    positions = None if reads is None else [np.array(read) for read in reads]
    found, started = Completeness(run.missed), 0
    joint: ComponentState | None = None
    with progress_bar("layers", end - starts[0].layer, run.progress) as bar:
        for index in range(starts[0].layer, end):
            layer, record = adapter.layer(index), trace.layers[index]
            kept = positions if index == end - 1 else None
            states = [] if joint is None else [joint.moved()]
            new = _start(trace, run, [start for start in starts[started:] if start.layer == index], found)
            started += len(new)
            states += new
            del new
            joint, source = _through_attention(states, trace.offsets, layer, record, run, kept)
            joint = through_mlp(joint, source, layer, record, run)
            del source  # before the next layer makes another one
            found.measure(joint, trace.resid(index + 1))
            if bar is not None:
                bar.finish()
    done = [] if joint is None else [joint]
    for state in _start(trace, run, starts[started:], found):  # they start where the sweep ends
        done.append(state if positions is None else state.at(state.layout.at(trace.offsets, positions)))
    return done, _by_decomposition(found, starts, end, trace.n_prompts)


def _start(trace: Trace, run: Run, starts: Sequence[PendingState], found: Completeness) -> list[ComponentState]:
    """Make the states, and measure their completeness."""
    states = [run.backend.prepare(start.device, start.make) for start in starts]
    for state in states:
        found.measure(state, trace.resid_at(state.layer, state.site))
    return states


def _by_decomposition(
    found: Completeness, starts: Sequence[PendingState], end: int, n_prompts: int
) -> list[list[Tensor]]:
    """Return the errors (P,) of each start: its own, and after every layer those that the joint state had there."""
    measured, errors = iter(found.errors()), []
    for index in range(starts[0].layer, end + 1):
        errors += [[next(measured)] for start in starts if start.layer == index]
        if index < end:
            for of_one, error in zip(errors, next(measured).view(-1, n_prompts).unbind(), strict=True):
                of_one.append(error)
    return errors


def _through_attention(
    states: list[ComponentState],
    offsets: np.ndarray,
    layer: Layer,
    record: LayerTrace,
    run: Run,
    reads: list[np.ndarray] | None,
) -> tuple[ComponentState, ComponentState | None]:
    """Return all ``states`` after the attention of a layer, at ``reads`` if given, as one joint state.

    The second result is the joint state that the MLP reads; None if it reads the first one. The list is emptied on the
    way, so that the rows of states that were copied are freed.
    """
    parts, sources = [], []
    while states:
        state = states.pop(0)
        state.rows = state.rows.to(layer.device)
        queries = None if reads is None else state.layout.at(offsets, reads)
        after, source = through_attention(state.moved(), layer, record, run, queries)
        parts.append(after)
        sources += [] if source is None else [source]
        del after, source
    joint = ComponentState.join(parts)
    parts.clear()
    return joint, ComponentState.join(sources) if sources else None
