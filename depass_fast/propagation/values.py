"""States that later layers read once more: those that took their values from an earlier layer."""

from __future__ import annotations

from ..adapters import Adapter, Layer
from ..state.state import ComponentState
from ..trace.record import LayerTrace
from .layer import copy_state
from .streams import read_rows


class KeptValues:
    """Copies of a state where it entered layers whose values later ones take; ``held`` are there already.

    A copy is let go behind the last layer that reads it.
    """

    def __init__(self, adapter: Adapter, held: dict[int, ComponentState] | None) -> None:
        sources = {index: adapter.kind(index).source for index in range(adapter.n_layers)}
        self._last = {source: index for index, source in sources.items() if source is not None}
        self._held = dict(held or {})

    def meet(self, state: ComponentState, index: int, record: LayerTrace) -> None:
        """Keep the state entering layer ``index`` if a later layer reads it; of several streams what it reads."""
        self._held = self.needed(index)
        if index in self._last and state.site == "resid_pre":
            streams = record.streams
            self._held[index] = copy_state(state) if streams is None else read_rows(state, streams.attention)

    def needed(self, index: int) -> dict[int, ComponentState]:
        """Return the copies that layers from ``index`` on read."""
        return {source: held for source, held in self._held.items() if self._last[source] >= index}

    def of(self, layer: Layer) -> ComponentState | None:
        """Return the state that a layer's values are read from, if it is another one that was kept."""
        source = None if layer.attention is None else layer.attention.source
        return None if source is None else self._held.get(source)
