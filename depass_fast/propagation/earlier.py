"""States that later layers read once more: values are taken from them, or experts read ahead of their layer."""

from __future__ import annotations

from ..adapters import Adapter, Layer
from ..components.base import Entry
from ..state.state import ComponentState
from ..trace.record import LayerTrace
from .copies import copy_state
from .streams import read_rows


class EarlierStates:
    """Copies of a state at the places that later layers read; ``held`` are there already.

    Values of a later layer are read where the state entered an earlier one, experts between an earlier one's attention
    and its MLP. A copy is let go behind the last layer that reads it.
    """

    def __init__(self, adapter: Adapter, held: dict[Entry, ComponentState] | None = None) -> None:
        self._last: dict[Entry, int] = {}
        for index in range(adapter.n_layers):
            kind = adapter.kind(index)
            if kind.source is not None:
                self._last[Entry(kind.source, "resid_pre")] = index
            if kind.has_experts_ahead:
                self._last[Entry(index - 1, "resid_mid")] = index
        self._held = dict(held or {})

    def meet(self, state: ComponentState, place: Entry, record: LayerTrace) -> None:
        """Keep a copy of the state at a ``place`` that a later layer reads.

        With several residual streams the copy has what attention reads there, in rows of D.
        """
        self._held = self.needed(place.layer)
        if place in self._last and (state.site == "resid_pre" or place.site == "resid_mid"):
            streams = record.streams
            self._held[place] = copy_state(state) if streams is None else read_rows(state, streams.attention)

    def needed(self, index: int) -> dict[Entry, ComponentState]:
        """Return the copies that layers from ``index`` on read."""
        return {place: held for place, held in self._held.items() if self._last[place] >= index}

    def values(self, layer: Layer) -> ComponentState | None:
        """Return the state that a layer's values are read from, if it is another one that was kept."""
        source = None if layer.attention is None else layer.attention.source
        return None if source is None else self._held.get(Entry(source, "resid_pre"))

    def ahead(self, source: int) -> ComponentState | None:
        """Return the state that the MLP of layer ``source`` read, if it was kept."""
        return self._held.get(Entry(source, "resid_mid"))
