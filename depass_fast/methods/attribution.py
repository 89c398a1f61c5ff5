"""Attributions of a request by the method that it names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..adapters import looked_up_once
from ..ledger.attribute import attribute as by_ledger
from ..readout.targets import Directions
from ..request import Request
from .adjoint import adjoint
from .exact import exact
from .layers import layers


@looked_up_once()
def attributions(request: Request, directions: Sequence[Directions] | None = None) -> list[list[Any]]:
    """Return a result per read of every prompt: an Attribution, or a LayeredAttribution for several layers.

    ``directions``, one per read of one prompt after the other, stand for the targets.
    """
    if request.method is not None and request.run.allocation.linear_rule is not None:
        return by_ledger(request, directions)
    if request.method is not None:
        return adjoint(request, directions)
    return layers(request, directions) if request.components.is_layered else exact(request, directions)
