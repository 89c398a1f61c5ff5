"""The way back where later layers take the values of an earlier one: gradients wait until it is reached."""

from __future__ import annotations

from torch import Tensor

from ..trace.record import Trace
from .batches import Packing


class Owed:
    """Gradients (R, T, D) of what enters layers whose values later ones took, until the way back is there.

    For components that start in between, all that these values bring is a constant.
    """

    def __init__(self) -> None:
        self._held: dict[int, Tensor] = {}

    def owe(self, source: int, gradients: Tensor, trace: Trace) -> None:
        """Add gradients (R, T, D) of what the attention of layer ``source`` reads."""
        streams = trace.layers[source].streams
        if streams is not None:  # these are of what the layer reads of its streams
            gradients = streams.attention.reads_back(gradients)
        before = self._held.get(source)
        self._held[source] = gradients if before is None else before + gradients.to(before)

    def paid(self, index: int) -> Tensor | None:
        """Return what is owed to the residual stream entering layer ``index``, and hold it no longer."""
        return self._held.pop(index, None)

    def add_worth(self, to: Tensor, packing: Packing, trace: Trace) -> Tensor:
        """Return ``to`` (R, P) plus the product of all that is still owed with the hidden states it belongs to."""
        for source, one in self._held.items():
            to = to + packing.dot(one, trace.resid(source).to(one), False).to(to)
        return to
