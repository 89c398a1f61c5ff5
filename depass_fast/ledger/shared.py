"""The way back where later layers read what an earlier one did: gradients wait until it is reached."""

from __future__ import annotations

from torch import Tensor

from ..components.base import Entry
from ..trace.record import Trace
from .batches import Packing


class Owed:
    """Gradients (R, T, D) of the residual stream at places that later layers read, until the way back is there.

    For components that start in between, all that such a layer makes of them is a constant.
    """

    def __init__(self) -> None:
        self._held: dict[Entry, Tensor] = {}

    def owe(self, place: Entry, gradients: Tensor) -> None:
        """Add gradients of the residual stream at a ``place``."""
        before = self._held.get(place)
        self._held[place] = gradients if before is None else before + gradients.to(before)

    def paid(self, place: Entry) -> Tensor | None:
        """Return what is owed to the residual stream at a ``place``, and hold it no longer."""
        return self._held.pop(place, None)

    def add_worth(self, to: Tensor, packing: Packing, trace: Trace) -> Tensor:
        """Return ``to`` (R, P) plus the product of all that is still owed with the hidden states it belongs to."""
        for place, one in self._held.items():
            to = to + packing.dot(one, trace.resid_at(*place).to(one), False).to(to)
        return to
