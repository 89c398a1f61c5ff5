"""Comparisons of a ledger's answers with exact propagation under the same rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from depass_fast import Attribution, ComponentKind, DePass, LayeredAttribution, Trace

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
RULES = ("shapley", "half", "taylor")


def scores_by_label(result: Attribution, target: int) -> dict[str, float]:
    """The scores of one target by label."""
    return dict(zip(result.labels, result.scores_of(target).tolist(), strict=True))


def distance(found: Attribution, exact: Attribution) -> float:
    """The largest difference of two results' scores, relative to Σ|score| of its target.

    A label that one of them lacks has the score zero there.
    """
    assert found.layer == exact.layer and found.position == exact.position
    assert found.target_names == exact.target_names and found.components == exact.components
    assert [label for label in found.labels if label in exact.labels] == exact.labels[: len(found.labels)]
    worst = 0.0
    for target in range(len(found.target_names)):
        ours, theirs = scores_by_label(found, target), scores_by_label(exact, target)
        size = sum(map(abs, theirs.values()))
        off = max(abs(ours.get(label, 0.0) - theirs.get(label, 0.0)) for label in {*ours, *theirs})
        worst = max(worst, off / size)
    return worst


def flat(results: Any) -> list[Attribution]:
    """All results of nested lists, layer by layer, in order."""
    if isinstance(results, Attribution):
        return [results]
    nested: Sequence = list(results) if isinstance(results, LayeredAttribution) else results
    return [one for part in nested for one in flat(part)]


def assert_exact(dp: DePass, trace: Trace, ledger: Any, kind: ComponentKind, rule: str, **reads: Any) -> None:
    """Assert that a ledger's answer is what exact propagation under its rule gives, and complete."""
    found = flat(ledger.scores(kind))
    exact = flat(dp.attribute(trace, kind, allocation=rule, method="exact", **reads))
    assert len(found) == len(exact)
    within = TOLERANCE[dp.adapter.dtype]
    for one, other in zip(found, exact, strict=True):
        assert distance(one, other) <= within, (kind, one.labels)
        assert one.completeness_error <= within and one.warnings is None


def off(found: dict[str, float], expected: dict[str, float], value: float) -> float:
    """The largest difference of scores by label, relative to Σ|scores|, where ``value`` is the sum of all.

    A label that is missing has the score zero; `rest` and `bias` are what is missing of the target.
    """
    named = {label: score for label, score in found.items() if label not in ("rest", "bias")}
    others = sum(found.values()) - sum(named.values())
    differences = [named.get(label, 0.0) - expected.get(label, 0.0) for label in {*named, *expected}]
    size = sum(map(abs, found.values()))
    return max(map(abs, [*differences, others - (value - sum(expected.values()))])) / size
