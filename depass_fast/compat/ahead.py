"""The layers ahead of a script that asks for one layer after the other: several are carried together, and kept.

States that are carried together share the weights, which are read and prepared once for all of them
(:mod:`depass_fast.propagation.joint`). The first call carries its layer alone, the second two layers, the next one
four, and so on: what nobody asks for in the end is less than what was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from itertools import takewhile

import torch
from torch import Tensor

from ..adapters import Adapter
from ..components.base import LayerKind
from ..methods.states import carry
from ..propagation.joint import PendingState, can_propagate_jointly, group_by_memory, propagate_jointly
from ..propagation.loop import through_final_norm
from ..propagation.run import Run
from ..readout.completeness import warn_if_states_miss
from ..state.state import ComponentState
from ..trace.record import Trace

ROWS = 4096  # of states that are carried together: beyond, weights cost nothing beside the products


@dataclass
class _Calls:
    """Calls for layers of one kind: the layer that would follow, how many were carried last, and what is ready.

    ``ready`` holds states at the end by their layers, with their completeness errors.
    """

    following: int | None = None
    size: int = 1
    ready: dict[int, tuple[ComponentState, list[Tensor]]] = field(default_factory=dict)


class LayersAhead:
    """The states of layers that are asked for next: of one trace, one set of options, and unchanged weights.

    They hold at most ``ROWS`` rows for every kind of components.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.clear()

    def clear(self) -> None:
        """Forget all states, and what was asked for."""
        self._options: Hashable = None
        self._calls: dict[LayerKind, _Calls] = {}

    @torch.no_grad()
    def carry(
        self, kind: LayerKind, trace: Trace, run: Run, options: Hashable, begin: Callable[[LayerKind], ComponentState]
    ) -> ComponentState:
        """Return the components of ``kind`` after the final norm, at once if they are ready.

        ``begin`` makes a state where it starts; ``options`` are what it and ``run`` depend on. For another trace or
        other weights than in the call before, :meth:`clear` comes first.
        """
        if options != self._options:
            self.clear()
            self._options = options
        layer = kind.resolve(self.adapter)
        calls = self._calls.setdefault(replace(kind, layer=0), _Calls())
        if layer not in calls.ready:
            is_next = layer == calls.following
            if not is_next and layer + 1 != calls.following:  # neither the next nor the same again
                calls.size = 1
                calls.ready.clear()
            state = begin(kind)
            group = self._group(state, kind, calls.size * 2, begin) if is_next and _may_join(trace, run) else [state]
            if len(group) == 1:
                calls.following = layer + 1
                return carry(self.adapter, trace, state, None, run)
            calls.size = len(group)
            ahead = [PendingState.of(one) for one in group]
            done = propagate_jointly(self.adapter, trace, ahead, self.adapter.n_layers, run)
            calls.ready = dict(enumerate(done, start=layer))
        calls.following = layer + 1
        state, errors = calls.ready.pop(layer)
        warn_if_states_miss(self.adapter, run, errors)
        state.rows = state.rows.clone()  # they were part of all
        return through_final_norm(self.adapter, trace, state)

    def _group(
        self, state: ComponentState, kind: LayerKind, size: int, begin: Callable[[LayerKind], ComponentState]
    ) -> list[ComponentState]:
        """Return the state of a layer and those of the layers behind it, ``size`` at most, with the same extras."""
        layer, extras = kind.resolve(self.adapter), state.layout.components[0].extras
        size = min(size, ROWS // state.layout.n_rows, self.adapter.n_layers - layer)
        behind = (begin(replace(kind, layer=layer + i)) for i in range(1, size))
        alike = takewhile(lambda one: one.layout.components[0].extras == extras, behind)
        fitting = next(group_by_memory(PendingState.of(one) for one in [state, *alike]))
        return [one.make() for one in fitting]


def _may_join(trace: Trace, run: Run) -> bool:
    """True if states of several layers can be carried together; not where memory is short, or steps are watched."""
    return run.memory_budget is None and run.verifier is None and can_propagate_jointly(trace, run)
