"""DePass under its rules."""

from __future__ import annotations

import warnings
from typing import Any

from ...components.model import Heads, Neurons, Tokens
from ...linear_rules import LINEAR_RULES
from ...options import Adjoint, RuleName
from ...results.estimate import ApproximationWarning
from ..interventions import HEADS, NEURONS
from .base import SOFTMAX, TOKENS, Found, Subject, by_read

REFINED = 200  # neurons that the adjoint sweep of the softmax rule refines


def shares(subject: Subject, rule: RuleName, temperature: float | None = None) -> Found:
    """Return the scores under a ``rule``: exact, but for the softmax rule's neurons, which come from a refined sweep.

    ``temperature`` is the softmax's; None: the engine's. Rules that are neither linear nor the softmax have no neurons.
    `half` is RelP, or AttnLRP with attention frozen.
    """
    return _by_ledger(subject, rule) if rule in LINEAR_RULES else _propagated(subject, rule, temperature)


def _by_ledger(subject: Subject, rule: Any) -> Found:
    book = subject.engine.ledger(subject.trace, subject.question.targets, rule=rule)
    n = len(subject.question.ids)
    asked = {TOKENS: lambda: book.tokens().scores[:, :n], HEADS: lambda: book.heads().scores}
    asked[NEURONS] = lambda: book.neurons().scores
    return {kind: by_read(rule, asked[kind]()) for kind in subject.kinds}


def _propagated(subject: Subject, rule: RuleName, temperature: float | None) -> Found:
    engine, trace, targets, found = subject.engine, subject.trace, subject.question.targets, {}
    given: Any = {"allocation": rule} | ({} if temperature is None else {"temperature": temperature})
    if TOKENS in subject.kinds:
        scores = engine.attribute(trace, Tokens(), targets, method="exact", **given).scores
        found[TOKENS] = by_read(rule, scores[:, : len(subject.question.ids)])
    if HEADS in subject.kinds:
        scores = engine.attribute(trace, Heads(layers="all"), targets, method="exact", **given).scores
        found[HEADS] = by_read(rule, scores)
    if NEURONS in subject.kinds and rule == SOFTMAX:
        sweep = Adjoint(refine=REFINED, sample=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ApproximationWarning)  # without a sample there is no estimate to heed
            scores = engine.attribute(trace, Neurons(layers="all"), targets, method=sweep, **given).scores
        found[NEURONS] = by_read(rule, scores)
    return found
