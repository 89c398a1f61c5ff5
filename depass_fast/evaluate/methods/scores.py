"""The scores of a question's tokens, heads and neurons by every method."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ...engine import DePass
from ..interventions import HEADS, NEURONS, check_maskable, widths
from ..questions import Question
from .attention import attention_weights
from .base import (
    ATTN_LRP,
    DELETED,
    GRADIENT,
    GRADIENT_INPUT,
    HALF,
    INTEGRATED,
    KINDS,
    LAST_ATTENTION,
    LINEAR,
    MAX,
    NO_READ,
    NORM,
    PUBLISHED_GRADIENT,
    PUBLISHED_NORM,
    RANDOM,
    RELU,
    REPLACED,
    ROLLOUT,
    SHAPLEY,
    SHAPLEY_QK,
    SOFTMAX,
    TAYLOR,
    TOKENS,
    Found,
    NotPossibleError,
    Scores,
    Subject,
    by_read,
)
from .gradients import gradients, published_gradients
from .integrated import integrated_gradients
from .norms import norms, published_norms
from .relevance import relevance
from .removal import leave_one_out
from .shares import shares


@dataclass(frozen=True)
class Source:
    """A computation that gives the scores of some methods, for the kinds that it is made for.

    ``named``: kinds for which it runs only where ``only`` names its method, as it takes a forward pass per component.
    """

    methods: tuple[str, ...]
    kinds: tuple[str, ...]
    score: Callable[[Subject], Found]
    named: tuple[str, ...] = ()


def _random(subject: Subject) -> Found:
    """Return numbers drawn evenly from [0, 1), of every kind its own."""
    engine, found = subject.engine, {}
    for kind in subject.kinds:
        draw = torch.Generator().manual_seed(3 * subject.seed + KINDS.index(kind))
        shape = [len(subject.question.ids)] if kind == TOKENS else [subject.n_layers, widths(engine, kind)[0]]
        found[kind] = {(RANDOM, NO_READ): torch.rand(shape, generator=draw)}
    return found


def _integrated(subject: Subject) -> Found:
    """Return the scores of integrated gradients; their errors and steps are facts."""
    found = integrated_gradients(subject.engine, subject.question, subject.steps)
    subject.facts["completeness"] = [float(f"{error:.4g}") for error in found.errors.tolist()]
    subject.facts["steps"] = found.steps
    return {TOKENS: by_read(INTEGRATED, found.scores)}


SOURCES = (
    Source((SOFTMAX,), KINDS, partial(shares, rule=SOFTMAX)),
    *(Source((rule,), (TOKENS, HEADS), partial(shares, rule=rule)) for rule in (LINEAR, RELU, MAX)),
    *(Source((rule,), KINDS, partial(shares, rule=rule)) for rule in (TAYLOR, HALF, SHAPLEY)),
    Source((ATTN_LRP,), KINDS, partial(relevance, rule=HALF, method=ATTN_LRP)),
    Source((SHAPLEY_QK,), KINDS, partial(relevance, rule=SHAPLEY, method=SHAPLEY_QK)),
    Source((GRADIENT_INPUT, GRADIENT), KINDS, gradients),
    Source((INTEGRATED,), (TOKENS,), _integrated),
    Source((DELETED,), (TOKENS, HEADS), leave_one_out, named=(HEADS,)),
    Source((REPLACED,), (TOKENS,), leave_one_out),
    Source((ROLLOUT, LAST_ATTENTION), (TOKENS,), attention_weights),
    Source((NORM,), KINDS, norms),
    Source((PUBLISHED_GRADIENT,), (HEADS, NEURONS), published_gradients),
    Source((PUBLISHED_NORM,), (HEADS, NEURONS), published_norms),
    Source((RANDOM,), KINDS, _random),
)
METHODS = tuple(method for source in SOURCES for method in source.methods)


def scores_of(
    engine: DePass,
    question: Question,
    kinds: Sequence[str] = (TOKENS,),
    *,
    seed: int = 0,
    only: Sequence[str] | None = None,
    steps: int = 512,
    facts: dict[str, Any] | None = None,
) -> dict[str, Scores]:
    """Return the scores of a question's components by every method: {kind: {(method, read): scores}}.

    Scores are float32 on the CPU: of tokens (N,), heads (L, H), neurons (L, I). A read is one of
    :data:`depass_fast.evaluate.questions.READS`, or "-" of a method that knows of no target.

    ``only`` limits the methods to some of :data:`METHODS`; one that is not made for a kind has no scores of it.
    "leave-one-out" of heads takes a forward pass for each: only where ``only`` names it. ``steps`` are the most of
    integrated gradients, 8 at least.

    ``facts`` is filled. "seconds": of every computation, by the name of its (first) method. "left out": the methods
    that do not go with this model or prompt, each with the reason. Integrated gradients adds "completeness", its
    relative errors in the three reads, and "steps", those that it took.

    Raises:
        ValueError: an unknown kind or method; ``kinds`` holds "neurons", and the model is a mixture of experts; a
            method that ``only`` names does not go with this model or prompt.
    """
    _check(engine, kinds, only)
    facts = {} if facts is None else facts
    facts |= {"seconds": {}, "left out": {}}
    found: dict[str, Scores] = {kind: {} for kind in kinds}
    trace = engine.trace(question.ids)
    subject = Subject(engine, question, trace, kinds, METHODS if only is None else only, seed, steps, facts)
    for source, asked in _asked(subject, is_named=only is not None):
        began = time.perf_counter()
        try:
            scores = source.score(asked)
        except NotPossibleError as error:
            if only is not None:
                raise ValueError(f"{asked.methods[0]}: {error} Take it out of `only`.") from None
            facts["left out"] |= dict.fromkeys(asked.methods, str(error))
            continue
        for kind, of_kind in scores.items():
            found[kind] |= {name: one for name, one in of_kind.items() if name[0] in asked.methods}
        facts["seconds"][asked.methods[0]] = round(time.perf_counter() - began, 3)
    return found


def _asked(subject: Subject, is_named: bool) -> Iterator[tuple[Source, Subject]]:
    """Yield the sources that are asked for, each with the part of the subject that it is to score."""
    for source in SOURCES:
        methods = [method for method in source.methods if method in subject.methods]
        kinds = [kind for kind in source.kinds if kind in subject.kinds and (is_named or kind not in source.named)]
        if methods and kinds:
            yield source, replace(subject, kinds=kinds, methods=methods)


def _check(engine: DePass, kinds: Sequence[str], only: Sequence[str] | None) -> None:
    """Raise ValueError for unknown kinds or methods, and for neurons that cannot be scored."""
    for name, given, known in (("kinds", kinds, KINDS), ("only", only or (), METHODS)):
        unknown = [one for one in given if one not in known]
        if isinstance(given, str) or unknown:
            wrong = given if isinstance(given, str) else unknown[0]
            raise ValueError(f"{name}: expected some of {', '.join(map(repr, known))}, got {wrong!r}.")
    if NEURONS in kinds:
        check_maskable(engine, NEURONS)
