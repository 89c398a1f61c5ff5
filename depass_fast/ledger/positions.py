"""Heads and neurons of a ledger, at all positions together or at some alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..components.base import ComponentKind, SeveralLayers
from ..components.model import Heads, Neurons
from ..components.outputs import LayerOutputs
from ..inputs.prompts import as_positions
from ..request import Request, with_trace
from ..results.attribution import Attribution
from .given import place
from .pages import Pages
from .places import LayerPlaces, places_of


class LedgerAtPositions:
    """Gives :class:`depass_fast.Ledger` its heads and neurons.

    Both take ``positions`` of one prompt. Negative ones count from its end. To answer takes one more forward pass.

    Raises:
        ValueError: ``positions`` of a ledger of several prompts or of its second book, or out of range; a model whose
            shares are not known at single positions.
    """

    def heads(
        self,
        layer: int | str | None = None,
        *,
        layers: SeveralLayers | None = None,
        positions: int | Sequence[int] | None = None,
    ) -> Any:
        """Return the scores of the attention heads of one layer or several, by default of all.

        With ``positions``, one or a list, a score counts what the head writes there alone. What it writes elsewhere
        is in `rest`. The ledger must be of one prompt. Errors as of the class.
        """
        return _asked(self, Heads(**place(layer, layers)), positions)

    def neurons(
        self,
        layer: int | str | None = None,
        *,
        layers: SeveralLayers | None = None,
        positions: int | Sequence[int] | None = None,
    ) -> Any:
        """Return the scores of the MLP's neurons of one layer or several, by default of all.

        With ``positions``, one or a list, a score counts what the neuron writes there alone. What it writes elsewhere
        is in `rest`. The ledger must be of one prompt. Errors as of the class.
        """
        return _asked(self, Neurons(**place(layer, layers)), positions)


def _asked(ledger: Any, kind: ComponentKind, positions: int | Sequence[int] | None) -> Any:
    if positions is None:
        return ledger.scores(kind)
    request: Request = ledger._request
    at = _checked(request, positions, ledger._is_steered)
    pages = _pages_at(request, ledger._pages, [one for one in at if one < request.carried[0]])
    answer = type(ledger)(request, ledger._reads, pages, ledger._one_position, None, ledger._seconds).scores(kind)
    for result in _each(answer):
        result.written_at = at
    return answer


def _checked(request: Request, positions: int | Sequence[int], steered: bool) -> list[int]:
    if len(request.prompts) != 1:
        raise ValueError(f"positions: they are of one prompt, and this ledger is of {len(request.prompts)}.")
    if steered:
        raise ValueError("positions: the second book is of all positions together; ask the first one.")
    if request.adapter.beyond_one_norm:
        found = ", ".join(request.adapter.beyond_one_norm)
        raise ValueError(f"positions: shares at single positions are not known of what this model has: {found}.")
    return sorted(set(as_positions(positions, len(request.prompts[0]))))


def _each(answer: Any) -> Iterator[Attribution]:
    """Every attribution of an answer: a result, one for each layer, or a list of these for several positions read."""
    if isinstance(answer, Attribution):
        yield answer
    else:
        for one in answer:
            yield from _each(one)


def _pages_at(request: Request, pages: Pages, at: Sequence[int]) -> Pages:
    """Return the pages with the scores of heads and neurons by what they write at the positions ``at``."""
    whole = with_trace(replace(request, trace=None))
    trace, rows = whole.require_trace(), len(next(iter(pages.gradients.values())))
    places, _ = places_of(request, pages, trace, [()] * rows)
    found = replace(pages, heads={}, neurons={})
    for one in places:
        if one.heads is not None:
            found.heads[one.layer] = one.heads[:, at].sum(1, keepdim=True).to(pages.heads[one.layer])
        if one.layer in pages.neurons:
            outputs = LayerOutputs(request.adapter, trace, one.layer, 0, torch.float32)
            found.neurons[one.layer] = _parts(one, pages.neurons[one.layer], outputs.reached(), at)
    return found


def _parts(place: LayerPlaces, whole: list[torch.Tensor], reached: list[int], at: Sequence[int]) -> list[torch.Tensor]:
    """Return the scores (R, 1, I) of each MLP of a layer at some positions: zero of experts that none was sent to."""
    parts = [torch.zeros_like(part) for part in whole]
    if place.neurons is not None:
        sums = place.neurons[:, at].sum(1, keepdim=True)
        for part, own in zip(reached, sums.split([whole[part].shape[2] for part in reached], 2), strict=True):
            parts[part] = own.to(whole[part])
    return parts
