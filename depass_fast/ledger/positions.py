"""Heads and neurons of a ledger, at all positions together or at some alone."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..components.base import SeveralLayers
from ..components.model import Heads, Neurons
from ..components.outputs import LayerOutputs
from ..inputs.prompts import as_positions
from ..request import Request, with_trace
from ..results.attribution import Attribution
from ..trace.record import LayerTrace, Trace
from .given import place
from .pages import Pages
from .places import shares_of


class LedgerAtPositions:
    """Gives :class:`depass_fast.Ledger` its heads and neurons.

    Both take ``positions`` of one prompt. Negative ones count from its end. An answer takes one more forward pass.
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
        is in `rest`. The ledger must be of one prompt.

        Raises:
            ValueError: a layer that is out of range or has none; the model's weights have changed. With ``positions``:
                a ledger of several prompts, its second book, a position out of range, a model whose shares are not
                known at single positions.
            RuntimeError: with ``positions``, a model whose routers decide otherwise in another forward pass.
        """
        return _asked(self, Heads(**place(layer, layers)), positions)

    def neurons(
        self,
        layer: int | str | None = None,
        *,
        layers: SeveralLayers | None = None,
        positions: int | Sequence[int] | None = None,
    ) -> Any:
        """Return the scores of the MLPs' neurons. Arguments and errors as of :meth:`heads`."""
        return _asked(self, Neurons(**place(layer, layers)), positions)


def _asked(ledger: Any, kind: Heads | Neurons, positions: int | Sequence[int] | None) -> Any:
    if positions is None:
        return ledger.scores(kind)
    began, request = time.perf_counter(), ledger._request
    at = _checked(request, positions, ledger._is_steered)
    kind.check(request.adapter, [len(ids) for ids in request.prompts])
    ledger._check_weights()
    pages = _pages_at(request, ledger._pages, kind, [one for one in at if one < request.carried[0]])
    answer = type(ledger)(request, ledger._reads, pages, ledger._one_position, None, ledger._seconds).scores(kind)
    for result in _each(answer):
        result.written_at, result.seconds = at, time.perf_counter() - began
    return answer


def _checked(request: Request, positions: int | Sequence[int], steered: bool) -> list[int]:
    if len(request.prompts) != 1:
        raise ValueError(f"positions: they are of one prompt, and this ledger is of {len(request.prompts)}.")
    if steered:
        raise ValueError("positions: the second book is of all positions together; ask the first one.")
    if request.adapter.beyond_one_norm:
        found = ", ".join(request.adapter.beyond_one_norm)
        raise ValueError(f"positions: shares at single positions are not known of what this model has: {found}.")
    return sorted(set(as_positions(positions, len(request.prompts[0]), "positions")))


def _each(answer: Any) -> Iterator[Attribution]:
    """Every attribution of an answer: a result, one for each layer, or a list of these for several positions read."""
    if isinstance(answer, Attribution):
        yield answer
    else:
        for one in answer:
            yield from _each(one)


def _pages_at(request: Request, pages: Pages, kind: Heads | Neurons, at: Sequence[int]) -> Pages:
    """Return the pages with the scores of some heads or neurons by what they write at the positions ``at``."""
    trace = with_trace(replace(request, trace=None)).require_trace()
    _check_routes(request.require_trace(), trace)
    found = replace(pages, heads={}, neurons={})
    for layer, shares in shares_of(request, pages, trace, kind):
        here = None if shares is None else shares[:, at].sum(1, keepdim=True).cpu()
        if isinstance(kind, Heads):
            assert here is not None
            found.heads[layer] = here.to(pages.heads[layer])
        else:
            outputs = LayerOutputs(request.adapter, trace, layer, 0, torch.float32)
            found.neurons[layer] = _parts(here, pages.neurons[layer], outputs.reached())
    return found


def _parts(sums: Tensor | None, whole: list[Tensor], reached: list[int]) -> list[Tensor]:
    """Return neurons' scores (R, 1, I) for each MLP of a layer, of ``sums`` over those that are reached: else zero."""
    parts = [torch.zeros_like(part) for part in whole]
    if sums is not None:
        for part, own in zip(reached, sums.split([whole[part].shape[2] for part in reached], 2), strict=True):
            parts[part] = own.to(whole[part])
    return parts


def _check_routes(known: Trace, again: Trace) -> None:
    """Raise RuntimeError if a forward pass sent positions to other experts than the one of the ledger's trace."""
    for index, (one, other) in enumerate(zip(known.layers, again.layers, strict=True)):
        if _routes(one) != _routes(other):
            raise RuntimeError(
                f"positions: the forward pass sent positions to other experts of layer {index} than the pass that the "
                "ledger is of, where rounding decides between two of them; make the ledger again."
            )


def _routes(layer: LayerTrace) -> list[tuple[int, list[int] | None]]:
    """Return the number of every MLP or expert that was recorded, with the positions that were sent to it."""
    return [(one.part, None if one.host_positions is None else one.host_positions.tolist()) for one in layer.mlps]
