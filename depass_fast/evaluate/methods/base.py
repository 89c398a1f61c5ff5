"""The names of the methods, and the subject that they score."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ...engine import DePass
from ...trace.record import Trace
from ..interventions import HEADS, NEURONS
from ..questions import READS, Question

TOKENS = "tokens"
KINDS = (TOKENS, HEADS, NEURONS)
NO_READ = "-"  # the read of a method that knows of no target

SOFTMAX, LINEAR, RELU, MAX = "softmax", "linear", "relu", "max"
TAYLOR, HALF, SHAPLEY = "taylor", "half", "shapley"
ATTN_LRP, SHAPLEY_QK = "AttnLRP", "shapley + QK"
GRADIENT, GRADIENT_INPUT = "gradient × activation", "gradient × input"
INTEGRATED = "integrated gradients"
ROLLOUT, LAST_ATTENTION = "attention rollout", "last-layer attention"
NORM, RANDOM = "norm", "random"
DELETED, REPLACED = "leave-one-out", "leave-one-out, replaced"
PUBLISHED_GRADIENT, PUBLISHED_NORM = f"{GRADIENT}, published", f"{NORM}, published"

Scores: TypeAlias = dict[tuple[str, str], Tensor]  # (method, read) -> scores; read is one of READS, or NO_READ
Found: TypeAlias = dict[str, Scores]  # kind -> scores


class NotPossibleError(ValueError):
    """A method does not go with a model, or with a prompt."""


@dataclass(frozen=True)
class Subject:
    """A question with its trace, the kinds of components whose scores are asked for, and the methods that are.

    steps: the most steps of integrated gradients. facts: what methods say of themselves beside their scores.
    """

    engine: DePass
    question: Question
    trace: Trace
    kinds: Sequence[str]
    methods: Sequence[str]
    seed: int = 0
    steps: int = 512
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def n_layers(self) -> int:
        return self.engine.adapter.n_layers


def by_read(method: str, scores: Tensor | Iterable[Tensor]) -> Scores:
    """Return the scores of a method in every read, float32 on the CPU; ``scores`` (3, ...) are in their order."""
    return {(method, read): plain(one) for read, one in zip(READS, scores, strict=True)}


def plain(scores: Tensor) -> Tensor:
    """Return scores in float32 on the CPU."""
    return scores.detach().to("cpu", torch.float32)
