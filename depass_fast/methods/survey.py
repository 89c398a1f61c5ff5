"""The components of several layers, as far as the trace tells: how many there are, and if they bring constants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..components.base import ComponentKind
from ..components.features import Features
from ..components.model import Neurons
from ..planning.shapes import named_components
from ..request import Request


@dataclass(frozen=True)
class Survey:
    """One layer's components: ``counts``, of every prompt the named ones; ``has_constant``, if they fill a `bias`."""

    counts: list[int]
    has_constant: bool


def survey(request: Request, kind: ComponentKind) -> Survey:
    """Return what a trace tells of one layer's components. Nothing is kept of them.

    Raises:
        ValueError, FloatingPointError: a dictionary does not fit the model, or has no active feature.
    """
    adapter, trace, prompts = request.adapter, request.require_trace(), range(len(request.prompts))
    if isinstance(kind, Features):  # a prompt at a time
        bound = (kind.bound(adapter, trace, prompt) for prompt in prompts)
        counts, constants = zip(*((len(one.labels), one.bias is not None) for one in bound), strict=True)
        return Survey(list(counts), any(constants))
    has_constant = kind.constant(adapter, trace, 0, request.run.state_dtype) is not None
    count, is_known = named_components(kind, adapter, 1)
    if is_known:
        return Survey([count] * len(prompts), has_constant)
    assert isinstance(kind, Neurons), "of the model's own parts, only experts' neurons depend on the prompt"
    return Survey(kind.counts(adapter, trace), has_constant)


def largest(surveys: Sequence[Survey]) -> list[int]:
    """Return the most named components that any layer has, of every prompt."""
    return [max(counts) for counts in zip(*(one.counts for one in surveys), strict=True)]
