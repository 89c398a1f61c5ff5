"""A graph from a request: one way back finds its nodes, one from each of them their edges."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..components.base import ComponentKind, Entry
from ..inputs.token_texts import token_texts
from ..labels import position_labels, text_of_tokens
from ..ledger.attribute import way_back
from ..ledger.batches import Packing
from ..ledger.pages import Wanted
from ..ledger.reads import Reads
from ..readout.collect import read_hidden
from ..readout.completeness import rounding_of
from ..request import Request, fit, wide_dtype, with_trace
from ..results.completeness import excess, warn_incomplete
from ..runtime.budget import Budget
from .between import Direct, Ways
from .dictionaries import dictionaries_of
from .graph import Graph
from .model import GraphModel
from .record import TOKEN, Place
from .seats import FEATURE, HEAD, Seat, Totals, leading

_CPU_WORKSPACE, _GPU_WORKSPACE = 1 << 28, 1 << 31
_ADVICE = "the trace and the gradients do not fit. Take a shorter prompt, or another device."
_PLACES = 1 << 20  # of the gradients: the least workspace


def graph_of(request: Request, kinds: Sequence[str], dictionaries: Sequence[ComponentKind], nodes: int) -> Graph:
    """Return the graph of a request of one prompt, read at one position, with one target, under a linear rule."""
    request = with_trace(fit(request, is_ledger=True))
    rule, trace = request.run.allocation.linear_rule, request.require_trace()
    assert rule is not None  # it was checked
    trace = replace(trace, source=trace.source.sampled(request.adapter.model))
    request, dtype = replace(request, trace=trace), wide_dtype(request)
    found, reads = dictionaries_of(dictionaries, request, dtype), Reads.of(request)
    pages = way_back(request, reads, Wanted(None, frozenset(), frozenset(), Entry(0, "resid_pre")))
    packing = Packing(trace.offsets, [list(range(trace.length(0)))])
    totals = Totals(request.adapter, trace, packing, pages, dtype, request.run.compute_dtype or dtype)
    seats = leading(totals, found, kinds, nodes, request.adapter.n_layers)
    ways = Ways(totals, reads, found, seats, rule)

    default = _CPU_WORKSPACE if request.adapter.device.type == "cpu" else _GPU_WORKSPACE
    budget = Budget(request.run.memory_budget, lambda _: default, lambda: None, _PLACES, _ADVICE)
    device = request.adapter.device
    direct = budget.prepare(device, lambda: ways.all(budget.bytes(device)))
    return _graph(request, ways, direct)


def _graph(request: Request, ways: Ways, direct: Direct) -> Graph:
    adapter, readout, totals = request.adapter, ways.reads.readout, ways.totals
    (_, position), directions = readout.places[0], readout.directions[0]
    ids = request.prompts[0].tolist()[: position + 1]
    tokens = request.tokens[0][: position + 1]
    worth = (totals.at(0, "resid_pre") * _embedded(ways)).sum(-1).tolist()
    places = tuple(
        Place(TOKEN, label, None, ids[n], n, share)
        for n, (label, share) in enumerate(zip(position_labels(tokens), worth, strict=True))
    )
    seats = tuple(_place(ways, seat) for seat in ways.seats)
    shares, activations = direct.shares.double(), direct.activations.double()
    # an activation may be a small difference of large numbers
    size = shares.abs().sum(1) + direct.sizes.double()
    errors = (shares.sum(1) - activations).abs() / size.clamp_min(torch.finfo(torch.float64).tiny)
    token, contrast = directions.ids[0], directions.contrast_ids[0]
    graph = Graph(
        shares=shares.numpy(),
        activations=activations.numpy(),
        errors=errors.numpy(),
        token_places=places,
        seats=seats,
        prompt=text_of_tokens(tokens),
        input_ids=ids,
        tokens=list(tokens),
        target_name=directions.names[0],
        target_kind=directions.kinds[0],
        target_ids=(token, contrast),
        target_text=_text(request, token),
        probability=None if token is None else _probability(request, token),
        position=position,
        rule=ways.rule,
        n_layers=adapter.n_layers,
        seconds=time.perf_counter() - request.began,
        provenance=request.provenance,
        constants=float(totals.pages.constants[Entry(0, "resid_pre")][0, 0]) + float(ways.reads.constants[0, 0]),
        model=GraphModel(request, ways, {place.id: number for number, place in enumerate(seats)}),
    )
    rounding = rounding_of(adapter, request.run, totals.compute)
    if not rounding.explains(graph.completeness_error, 0.0):
        text = excess(graph.completeness_error, rounding, "a node's activation", False)
        graph.warnings.append(text)
        warn_incomplete(text)
    return graph


def _embedded(ways: Ways) -> Tensor:
    """Return what the tokens are where the first layer reads: (T, D)."""
    trace = ways.totals.trace
    return (trace.layers[0].resid_pre if trace.layers else trace.resid_final).to(ways.totals.dtype)


def _place(ways: Ways, seat: Seat) -> Place:
    index, adapter = seat.index, ways.totals.adapter
    if seat.kind == HEAD:
        label = f"L{seat.layer}H{index}"
    elif seat.kind == FEATURE:
        dictionary = list(ways.dictionaries.values())[seat.part]
        label, index = dictionary.names[index], dictionary.features[index]
    else:
        part = ways.totals.trace.layers[seat.layer].mlps[seat.part].part
        label = f"L{seat.layer}{adapter.mlps(seat.layer)[part].name}N{index}"
        return Place(seat.kind, label, seat.layer, index, seat.position, seat.share, part)
    return Place(seat.kind, label, seat.layer, index, seat.position, seat.share, seat.part)


def _text(request: Request, token: int | None) -> str | None:
    return None if token is None else token_texts([token], request.tokenizer)[0]


def _probability(request: Request, token: int) -> float:
    """Return the model's probability of a token at the place that is read."""
    logits = request.adapter.logits(read_hidden(request))[0]
    return float(logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)[token])
