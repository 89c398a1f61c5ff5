"""Credit of attention: what a target owes to where heads look, component by component and head by head."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from torch import Tensor

from ..components.base import Entry
from ..ledger.attribute import way_back
from ..ledger.pages import Wanted
from ..ledger.reads import Reads
from ..ledger.steering import Steers
from ..looking.rows import PromptRows
from ..looking.steer import Steering, steer
from ..options import LinearRuleName, Options
from ..propagation.loop import propagate
from ..readout.collect import how_computed
from ..readout.completeness import rounding_of
from ..request import Request, fit, gradients_of, start, traced, wide_dtype
from ..results.completeness import excess, warn_incomplete
from ..results.credit import AttentionCredit, credit_error
from ..results.verification import warn_if_off
from ..runtime.memory import available, readable
from ..runtime.precision import full_precision
from ..state.state import ComponentState
from .explain import first_attention

_HELD = 1 << 24  # numbers of gradients that are held at once


def credits_of(request: Request, rule: LinearRuleName, linear: Options) -> list[AttentionCredit]:
    """Return the credit in every prompt. ``rule`` is that of the way from heads to the target, ``linear`` its options.

    Raises:
        ValueError: components of several layers, or that reach no attention; queries and keys that cannot be made
            again.
        MemoryError: it cannot fit.
    """
    entry = request.components.entry(request.adapter)
    first = first_attention(entry)
    if first >= request.end:
        raise ValueError("components: they start behind the last attention, so that no head looks at them.")
    request = traced(fit(request))
    adapter, trace = request.adapter, request.require_trace()
    layers = list(range(first, request.end))
    back = replace(request, run=linear.build(adapter), settings=linear)
    reads = Reads.of(back)
    _check_memory(request, len(layers))
    steers = Steers.of(adapter, trace, request.prompts, layers, keeps=True)
    way_back(back, reads, Wanted(frozenset(), frozenset(), frozenset(), Entry(first, "resid_pre")), steers)

    state, found, errors, checks = start(request), {}, [], []
    for layer in range(entry.layer, request.end):
        if layer in steers.kept:
            for prompt, outlook in enumerate(steers.kept.pop(layer)):
                with full_precision():
                    found[prompt, layer] = _of_layer(state, prompt, steer(outlook))
        if layer < layers[-1]:
            state, passed = propagate(adapter, trace, state, layer + 1, request.run)
            errors += passed
            checks.append(request.run.verified())
    verified = max(
        (one for one in checks if one is not None), key=lambda one: (not one.passed, one.error), default=None
    )
    said = warn_if_off(verified, request.run.backend.name)
    layer_errors = torch.stack([one.cpu() for one in errors]) if errors else torch.zeros(1, trace.n_prompts)
    results: list[AttentionCredit] = []
    for place, (prompt, position) in enumerate(reads.readout.places):
        parts = [found[prompt, layer] for layer in layers]
        results.append(_result(request, rule, reads, place, prompt, position, layers, parts, layer_errors[:, prompt]))
    for result in results:
        result.verification, result.warnings = verified, said
    _warn(request, results, steers.off)
    return results


def _of_layer(state: ComponentState, prompt: int, steering: Steering) -> tuple[tuple[str, ...], Tensor, Tensor]:
    """Return the labels, the scores (R, H, M) of one layer in a prompt and the changes (R, H), in host memory."""
    sides = steering.sides
    has_constants = bool((steering.constant != 0).any()) or any(
        one.constant is not None for one in (sides.of_q, sides.of_k)
    )
    rows = PromptRows.of(state, prompt, has_constants, bool((steering.position != 0).any()))
    r, n, heads, _ = steering.of_q.shape
    scores = steering.of_q.new_zeros(r, heads, len(rows.labels))
    step = max(1, _HELD // (r * n * state.rows.shape[1]))
    for begin in range(0, heads, step):
        some = slice(begin, min(heads, begin + step))
        gradients = steering.apart(some)  # (R, h, N, D)
        scores[:, some] = rows.summed_dots(gradients.flatten(0, 1), range(n)).view(r, -1, len(rows.labels))
    if rows.bias is not None:
        scores[..., rows.bias] += steering.constant
    if rows.position is not None:
        scores[..., rows.position] += steering.position
    return rows.labels, scores.cpu(), steering.change.cpu()


def _result(
    request: Request,
    rule: str,
    reads: Reads,
    place: int,
    prompt: int,
    position: int,
    layers: list[int],
    parts: list[tuple[tuple[str, ...], Tensor, Tensor]],
    layer_errors: Tensor,
) -> AttentionCredit:
    directions, some = reads.readout.directions[place], reads.rows[place]
    labels = list(dict.fromkeys(label for names, *_ in parts for label in _numbered(names)))
    scores = torch.zeros(
        some.stop - some.start, len(layers), parts[0][1].shape[1], len(labels), dtype=parts[0][1].dtype
    )
    where = {label: i for i, label in enumerate(labels)}
    for i, (names, of_layer, _) in enumerate(parts):
        scores[:, i, :, [where[label] for label in _numbered(names)]] = of_layer[some]
    changes = torch.stack([of_layer[some] for *_, of_layer in parts], 1)
    how = how_computed(request, prompt)
    passed = ("components", "allocation", "temperature", "backend", "device", "dtype", "state_dtype", "compute_dtype")
    keep = slice(None) if directions.several else 0
    errors = layer_errors.tolist()
    return AttentionCredit(
        **{name: how[name] for name in (*passed, "exclude_special", "site", "provenance")},
        scores=scores[keep],
        changes=changes[keep],
        target_logits=reads.readout.logits[place][keep],
        labels=[label for label, _ in labels],
        layers=layers,
        rule=rule,
        completeness_error=max(credit_error(scores, changes), *errors),
        layer_errors=errors,
        target_names=list(directions.names),
        target_ids=list(directions.ids),
        contrast_ids=list(directions.contrast_ids),
        target_kinds=list(directions.kinds),
        input_ids=request.prompts[prompt].tolist(),
        tokens=request.tokens[prompt],
        position=position,
        layer=request.layer,
        seconds=time.perf_counter() - request.began,
    )


def _numbered(names: tuple[str, ...]) -> list[tuple[str, int]]:
    """Return labels that differ, also where two components have the same."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, -1) + 1
        found.append((name, seen[name]))
    return found


def _check_memory(request: Request, n_layers: int) -> None:
    """Raise MemoryError if queries, keys, values and gradients of all layers do not fit."""
    adapter, free = request.adapter, available(request.adapter.device)
    weights = adapter.attention(0)
    width = weights.n_heads * (weights.head_dim * max(gradients_of(request), default=1) + weights.key_dim)
    width += weights.n_kv_heads * (weights.head_dim + weights.key_dim)
    need = n_layers * width * sum(request.carried) * wide_dtype(request).itemsize
    if free is not None and need > free:
        raise MemoryError(
            f"attention_credit: queries, keys, values and gradients of {n_layers} layers need {readable(need)}, and "
            f"{readable(free)} are available. Take components of a later layer, a shorter prompt or fewer targets; "
            "ledger(attention=True) holds less."
        )


def _warn(request: Request, results: list[AttentionCredit], off: float) -> None:
    """Add a warning to every result that misses more than its dtypes explain, and issue one."""
    rounding, own = rounding_of(request.adapter, request.run), callable(request.run.allocation.rule)
    texts = []
    for result in results:
        if not rounding.explains(result.completeness_error, max(result.layer_errors[0], off)):
            texts.append(excess(result.completeness_error, rounding, "the credit of attention", own))
            result.warnings = [*(result.warnings or []), texts[-1]]
    if texts:
        warn_incomplete(texts[0])
