"""Why the heads of a layer looked where they looked: their logits, shared out over components."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..adapters import Adapter
from ..components.base import ComponentKind, Entry
from ..inputs.hook_names import parse_hook_name
from ..inputs.prompts import as_position, is_list_of_positions
from ..looking.explain import Explained, explain, parts_at
from ..looking.freeze import freeze_sides
from ..looking.logits import logits_of
from ..looking.rows import PromptRows
from ..looking.sides import Sides
from ..looking.turned import turns_of
from ..looking.without import looks_without
from ..propagation.loop import propagate
from ..readout.collect import how_computed
from ..readout.completeness import rounding_of
from ..request import Request, check_kind, fit, start, traced, wide_dtype
from ..results.completeness import excess, warn_incomplete
from ..results.explanation import AttentionExplanation
from ..results.verification import warn_if_off
from ..runtime.memory import available, readable
from ..runtime.numbers import as_index
from ..runtime.precision import full_precision
from ..trace.record import AttentionTrace

_HOOKS = ("hook_resid_pre", "attn.hook_pattern", "attn.hook_attn_scores")
KEPT = 1 << 28  # bytes of states that a result keeps for its pairs


def attention_layer(layer: Any, adapter: Adapter) -> int:
    """Return the number of a layer whose attention is asked for. Raises ValueError if it is out of range."""
    if layer == "all":
        raise ValueError("layer: one layer at a time; attention_credit is of all of them.")
    number = parse_hook_name(layer, "layer", _HOOKS)[0] if isinstance(layer, str) else as_index(layer, "layer")
    if not -adapter.n_layers <= number < adapter.n_layers:
        raise ValueError(f"layer: {layer} is out of range; this model has {adapter.n_layers} layers.")
    return number % adapter.n_layers


def first_attention(entry: Entry) -> int:
    """Return the first layer whose attention reads components that enter at ``entry``."""
    return entry.layer + (entry.site == "resid_mid")


def check_start(components: ComponentKind, adapter: Adapter, layer: int) -> None:
    """Raise ValueError if the attention of ``layer`` reads nothing of the components, or they are of several layers."""
    refuse_several(components)
    first = first_attention(components.entry(adapter))
    if first > layer:
        later = "" if first >= adapter.n_layers else f" a layer from {first} on, or"
        raise ValueError(
            f"layer: the attention of layer {layer} reads none of these components, which enter after it; choose"
            f"{later} components that enter earlier."
        )


def refuse_several(components: Any) -> None:
    """Raise TypeError unless ``components`` is a kind, and ValueError if it is of several layers."""
    check_kind(components)
    if components.is_layered:
        raise ValueError(
            "layers: one layer's components at a time; ledger(..., attention=True).steered has the credit of all."
        )


def heads_of(head: Any, adapter: Adapter, layer: int) -> tuple[list[int], bool]:
    """Return the numbers of the heads that are asked for, and whether that is one by itself; None: all.

    Raises:
        ValueError: out of range, given twice, or none at all.
        TypeError: no integer and no list of them.
    """
    count = adapter.attention(layer).n_heads
    if head is None:
        return list(range(count)), False
    several = is_list_of_positions(head)
    found = [as_index(one, "head", "an integer or a list of them") for one in (head if several else [head])]
    for one in found:
        if not -count <= one < count:
            raise ValueError(f"head: {one} is out of range; layer {layer} has {count} heads.")
    found = [one % count for one in found]
    if not found or len({*found}) < len(found):
        raise ValueError("head: the list is empty." if not found else "head: a head is there twice.")
    return found, not several


def explanations(
    request: Request, layer: int, heads: list[int], one_head: bool, query: int, key: Any
) -> list[AttentionExplanation]:
    """Return an :class:`AttentionExplanation` for every prompt. ``request`` ends at the input of ``layer``.

    Raises:
        ValueError: a query or key that is out of range, after the query or hidden by a window; queries and keys that
            cannot be made again; components of several layers.
        MemoryError: the shares do not fit.
    """
    queries = [as_index_of_query(query, len(ids)) for ids in request.prompts]
    for ids, at in zip(request.prompts, queries, strict=True):
        _keys(key, len(ids), at, 0, layer)
    request = traced(fit(replace(request, reads=tuple((at,) for at in queries))))
    adapter, trace, record = request.adapter, request.require_trace(), request.require_trace().layers[layer].attention
    seen = zip(request.prompts, queries, strict=True)
    keys = [_keys(key, len(ids), at, record.first_seen(at), layer) for ids, at in seen]
    turns = turns_of(adapter, request.prompts, [layer])
    sides = [
        freeze_sides(adapter, layer, record, trace.span(p), turns[p][layer], wide_dtype(request))
        for p in range(trace.n_prompts)
    ]
    state, errors = propagate(adapter, trace, start(request), layer, request.run)
    verified = request.run.verified()
    said = warn_if_off(verified, request.run.backend.name)
    layer_errors = torch.stack([one.cpu() for one in errors])
    results, texts = [], []
    for p, (of_p, some) in enumerate(zip(sides, keys, strict=True)):
        constants = record.row_sum is not None or any(x.constant is not None for x in (of_p.of_q, of_p.of_k))
        rows = PromptRows.of(state, p, constants, record.key_bias is not None)
        _check_memory(of_p, len(heads), len(some), len(rows.labels))
        with full_precision():
            found = explain(rows, of_p, record, trace.span(p), heads, queries[p], some)
        result = _result(request, p, layer, heads, one_head, queries[p], some, rows, found, layer_errors[:, p].tolist())
        result.asked = "all" if key is None else "one" if len(some) == 1 else "pair"
        result.verification, result.warnings = verified, said
        result._parts, result._looks = _kept(rows, of_p, record, trace.span(p), heads, queries[p], some)
        begun = max(result.layer_errors[0], of_p.off)
        rounding = rounding_of(adapter, request.run)
        if not rounding.explains(result.completeness_error, begun):
            missed = "the attention logits"
            texts.append(excess(result.completeness_error, rounding, missed, callable(request.run.allocation.rule)))
            result.warnings = [*(said or []), texts[-1]]
        results.append(result)
    if texts:
        warn_incomplete(texts[0])
    return results


def as_index_of_query(query: Any, length: int) -> int:
    """Return a query's position; negative ones count from the end. Raises ValueError if it is out of range."""
    return _named("query", query, length)


def _named(name: str, given: Any, length: int) -> int:
    try:
        return as_position(given, length)
    except (ValueError, TypeError) as error:
        raise type(error)(str(error).replace("position:", f"{name}:", 1)) from None


def _keys(key: Any, length: int, query: int, first: int, layer: int) -> list[int]:
    """Return the keys that are asked for: all that the query sees, from ``first`` on, one, or two."""
    if key is None:
        return list(range(first, query + 1))
    several = is_list_of_positions(key)
    given = list(key) if several else [key]
    if several and len(given) != 2:
        raise ValueError(
            f"key: expected a position, two of them (why one and not the other) or None; got {len(given)}."
        )
    found = [_named("key", one, length) for one in given]
    for one, at in zip(given, found, strict=True):
        if at > query:
            raise ValueError(f"key: {one} is behind the query at position {query}, which cannot see it.")
        if at < first:
            raise ValueError(
                f"key: {one} is hidden by the window of layer {layer}; the query at position {query} sees {first} to "
                f"{query}."
            )
    if len(found) == 2 and found[0] == found[1]:
        raise ValueError(f"key: {given[0]!r} and {given[1]!r} are the same position.")
    return found


def _check_memory(sides: Sides, heads: int, keys: int, components: int) -> None:
    """Raise MemoryError if the shares of both sides do not fit."""
    need, free = 3 * heads * keys * components * sides.q.element_size(), available(sides.q.device)
    if free is not None and need > free:
        raise MemoryError(
            f"explain_attention: the shares of {heads} heads, {keys} keys and {components} components need "
            f"{readable(need)}, and {readable(free)} are available. Ask for fewer heads, for one key, or for fewer "
            "components."
        )


def _kept(
    rows: PromptRows,
    sides: Sides,
    record: AttentionTrace,
    span: slice,
    heads: list[int],
    query: int,
    keys: list[int],
) -> tuple[Any, Any]:
    """Return what answers `pairs`, and what answers `without`; None where too much would be kept on the device."""
    counts = rows.state.layout.counts[rows.state.layout.segments(rows.prompt)]
    width = rows.state.rows.shape[1] * rows.state.rows.element_size()
    held = sides.q.nbytes + 2 * sides.k.nbytes + sum(int(counts[at]) for at in {query, *keys}) * width
    if held * (int(rows.state.layout.prompt[-1]) + 1) > KEPT:
        return None, None
    kept = rows.only([*sorted({query, *keys})])
    nothing = record.q.new_empty(0)
    bias = None if record.key_bias is None else record.key_bias[span]
    own = replace(record, resid=record.resid[span], q=nothing, k=nothing, key_bias=bias)  # of this prompt alone
    given: dict[str, Any] = {"rows": kept, "sides": sides, "record": own, "query": query}
    given["span"] = slice(0, span.stop - span.start)
    is_whole = len(keys) == query + 1 - record.first_seen(query)
    looks = partial(_looks, heads=heads, **given) if is_whole else None
    return partial(_parts, **given), looks


def _looks(
    side: str,
    norms_react: bool,
    *,
    heads: list[int],
    rows: PromptRows,
    sides: Sides,
    record: AttentionTrace,
    span: slice,
    query: int,
) -> Tensor:
    """Return where heads look without each component, (H, M, N) in host memory."""
    with torch.no_grad(), full_precision():
        return looks_without(rows, sides, record, span, heads, query, side, norms_react).cpu()


@torch.no_grad()
def _parts(
    head: int, key: int, *, rows: PromptRows, sides: Sides, record: AttentionTrace, span: slice, query: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the parts (M, d) of a head's query, its logits' factor in them, and of a key; and what is added (M,)."""
    at = torch.tensor([query], device=sides.q.device)
    found = logits_of(sides, record, span, slice(head, head + 1), at, query + 1)
    of_query = parts_at(rows, sides.of_q, query, sides.q)[:, head] * found.ratio[0, 0, key]
    of_key = parts_at(rows, sides.of_k, key, sides.k)[:, head // sides.groups]
    place = of_query.new_zeros(len(of_query))
    if found.bias is not None and rows.position is not None:
        place[rows.position] = found.bias[0, 0, key]
    return of_query, of_key, place


def _result(
    request: Request,
    prompt: int,
    layer: int,
    heads: list[int],
    one_head: bool,
    query: int,
    keys: list[int],
    rows: PromptRows,
    found: Explained,
    layer_errors: list[float],
) -> AttentionExplanation:
    """Return one prompt's result; its tensors are in host memory."""
    how = how_computed(request, prompt)
    names = ("query_side", "key_side", "query_mean", "key_mean", "entropy", "probabilities", "sink")
    tensors = {name: getattr(found, name) for name in names} | {"scores": found.logits}
    held = {name: x.cpu() for name, x in tensors.items() if x is not None}
    if one_head:
        held = {name: x[0] for name, x in held.items()}
    passed = ("components", "allocation", "temperature", "backend", "device", "dtype", "state_dtype", "compute_dtype")
    return AttentionExplanation(
        **held,
        **{name: how[name] for name in (*passed, "exclude_special", "site", "provenance")},
        labels=list(rows.labels),
        layer=layer,
        heads=heads,
        query=query,
        keys=keys,
        completeness_error=max(float(found.error), *layer_errors),
        layer_errors=layer_errors,
        input_ids=request.prompts[prompt].tolist(),
        tokens=request.tokens[prompt],
        start=request.layer,
        seconds=time.perf_counter() - request.began,
        one_head=one_head,
    )
