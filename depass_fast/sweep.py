"""All start layers in one sweep: several decompositions of one trace carried through the layers together.

They share the trace and every weight (DESIGN.md section 3): at a layer, the rows of all that have started before go
through one step of the backend, each with its own softmax. A joint state orders rows by position, then by
decomposition: attention, to which it is all the same where a component belongs, sees one wide decomposition, the MLP a
segment per position and decomposition.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from torch import Tensor

from .adapters import Adapter
from .options import Run
from .state import ComponentState, Layout
from .step import through_attention, through_mlp
from .trace import Trace

_BYTES = 1 << 30  # of states that are carried together


def can_sweep(trace: Trace, run: Run) -> bool:
    """Whether states can be carried together: on a backend for jagged rows, and where no values are clamped."""
    return run.backend.name != "reference" and not any(
        layer.attention.value_ratio is not None for layer in trace.layers
    )


def together(states: Iterable[ComponentState]) -> Iterator[list[ComponentState]]:
    """Neighbouring states, as many as fit into memory together with a copy."""
    group: list[ComponentState] = []
    for state in states:
        if group and sum(other.nbytes for other in group) + state.nbytes > _BYTES:
            yield group
            group = []
        group.append(state)
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
    reads = None if reads is None else [np.array(r) for r in reads]
    errors = [[s.completeness(trace.resid_at(s.layer, s.site))] for s in states]
    joint, n_joined = None, 0
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
        joint = through_mlp(joint, None if None in sources else ComponentState.join(sources), layer, record, run)
        worst = joint.completeness(trace.resid(index + 1)).view(n_joined, -1)
        for d in range(n_joined):
            errors[d].append(worst[d])
    done = [] if joint is None else joint.apart()
    for state in states[n_joined:]:  # they start where the sweep ends
        done.append(state if reads is None else state.at(_at(state.layout, trace.offsets, reads)))
    return list(zip(done, errors, strict=True))


def _at(layout: Layout, offsets: np.ndarray, reads: Sequence[np.ndarray]) -> Layout:
    """A layout, joint or not, at some positions of every prompt."""
    parts = [Layout.of(part.components, offsets, list(reads)) for part in layout.apart()]
    return parts[0] if len(parts) == 1 else Layout.join(parts)
