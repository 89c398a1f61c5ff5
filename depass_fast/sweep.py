"""All start layers in one sweep: several decompositions of one trace carried through the layers together.

They share the trace and every weight: at a layer, the rows of all that have started before go
through one step of the backend, each with its own softmax. A joint state orders rows by position, then by
decomposition: attention, to which it is all the same where a component belongs, sees one wide decomposition, the MLP a
segment per position and decomposition.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from torch import Tensor

from .adapters import Adapter
from .memory import available
from .options import Run
from .progress import bar
from .state import ComponentState, Layout
from .step import through_attention, through_mlp
from .trace import Trace

BYTES = 1 << 30  # of states that are carried together, at most


def can_sweep(trace: Trace, run: Run) -> bool:
    """Whether states can be carried together: on a backend for jagged rows in memory, where no values are clamped."""
    clamped = any(layer.attention.value_ratio is not None for layer in trace.layers)
    return run.backend.name != "reference" and not run.host and not clamped


def together(states: Iterable[ComponentState]) -> Iterator[list[ComponentState]]:
    """Neighbouring states, as many as fit into memory together with two copies. A group is the caller's to empty."""
    group: list[ComponentState] = []
    for state in states:
        group.append(state)
        size, free = state.nbytes, available(state.device)
        limit = BYTES if free is None else min(BYTES, free // 8)
        del state  # before the next one is made
        if sum(other.nbytes for other in group) + size > limit:
            yield group
            group.clear()
    if group:
        yield group


def sweep(
    adapter: Adapter,
    trace: Trace,
    states: Sequence[ComponentState],
    end: int,
    run: Run,
    reads: Sequence[Sequence[int]] | None = None,
) -> list[tuple[ComponentState, list[Tensor]]]:
    """Carry every state to the input of layer ``end``, as `DePass.propagate` does one; they are used up.

    ``states`` must be in the order of where they start, of components that live everywhere, and agree in their extras.
    Returned are, in that order, the states (at ``reads`` of every prompt, if given) and their completeness errors at
    the start and after every layer.
    """
    run.watch(trace, reads)
    reads = None if reads is None else [np.array(r) for r in reads]
    starts = [s.completeness(trace.resid_at(s.layer, s.site)) for s in states]
    passed: list[Tensor] = []  # per layer, of those that have started (d, P)
    joint, n_joined = None, 0
    with bar("layers", end - states[0].layer, run.progress) as shown:
        for index in range(states[0].layer, end):
            layer, record, kept = adapter.layer(index), trace.layers[index], reads if index == end - 1 else None
            starting = [s for s in states[n_joined:] if s.layer == index]
            n_joined += len(starting)
            parts = []
            for state in ([] if joint is None else [joint]) + starting:
                state.rows = state.rows.to(layer.device)
                queries = None if kept is None else _at(state.layout, trace.offsets, kept)
                parts.append(through_attention(state, layer, record, run, queries))
            joint = ComponentState.join([state for state, _ in parts])
            sources = [source for _, source in parts]
            source = None if None in sources else ComponentState.join(sources)
            del parts, sources
            if len(joint.layout.components) > len(trace.offsets) - 1:  # a copy: the rows that went into it can go
                for state in states[:n_joined]:
                    state.rows = state.rows[:0].clone()
            joint = through_mlp(joint, source, layer, record, run)
            passed.append(joint.completeness(trace.resid(index + 1)).view(n_joined, -1))
            if shown is not None:
                shown.finish()
    errors = [[start] for start in starts]
    for worst in passed:
        for mine, error in zip(errors, worst.unbind(), strict=False):
            mine.append(error)
    done = [] if joint is None else joint.apart()
    for state in states[n_joined:]:  # they start where the sweep ends
        done.append(state if reads is None else state.at(_at(state.layout, trace.offsets, reads)))
    return list(zip(done, errors, strict=True))


def _at(layout: Layout, offsets: np.ndarray, reads: Sequence[np.ndarray]) -> Layout:
    """A layout, joint or not, at some positions of every prompt."""
    parts = [Layout.of(part.components, offsets, list(reads)) for part in layout.apart()]
    return parts[0] if len(parts) == 1 else Layout.join(parts)
