"""Statements that are true or false, and the classifiers that tell them apart by a model's hidden states."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..demo import demo_prompts
from ..demo.text import world
from ..inputs.records import read_records
from .probes import Classifier, fit_classifier

FOLDS = 5
PENALTY = 0.1  # of the squared weights, of hidden states scaled to a standard deviation of one
DEMO_COUNT = 240  # statements of the demo model
SENTENCES = re.compile(r"Statement \d+:|(?<=[.!?])\s+")


@dataclass(frozen=True)
class Statements:
    """Different texts with their labels (S,), 1 for true and 0 for false.

    ``groups`` are the numbers of those that share a sentence: they are held out together.
    """

    texts: Sequence[str]
    labels: Tensor
    groups: Sequence[Sequence[int]]

    @classmethod
    def of(cls, texts: Sequence[str], labels: Sequence[int]) -> Statements:
        """Group the statements of these texts. Of equal ones the first counts."""
        label_of = dict(zip(reversed(texts), reversed(labels), strict=True))
        different = list(dict.fromkeys(texts))
        return cls(different, torch.tensor([label_of[text] for text in different]), groups_of(different))

    def folds(self, seed: int) -> list[list[int]]:
        """Return the numbers of the statements in :data:`FOLDS` parts of about one size; no group is cut."""
        groups = random.Random(f"folds-{seed}").sample(list(self.groups), len(self.groups))
        found: list[list[int]] = [[] for _ in range(FOLDS)]
        for group in sorted(groups, key=len, reverse=True):
            min(found, key=len).extend(group)
        return found

    def fit(self, x: Tensor, numbers: Sequence[int]) -> Classifier:
        """Return the classifier that learns from some of the statements, with hidden states x (S, D) of all.

        Raises:
            ValueError: they are all true, or all false.
        """
        return fit_classifier(x[list(numbers)], self.labels[list(numbers)], classes=2, penalty=PENALTY)

    def accuracy(self, found: Classifier, x: Tensor, numbers: Sequence[int]) -> float:
        """Return the part of some statements that a classifier is right about."""
        return float((found.predict(x[list(numbers)]) == self.labels[list(numbers)]).double().mean())


def groups_of(texts: Sequence[str]) -> list[list[int]]:
    """Return the numbers of the texts in groups: two that share a sentence are in one group."""
    above, owner = list(range(len(texts))), {}

    def group(number: int) -> int:
        while above[number] != number:
            number = above[number]
        return number

    for number, text in enumerate(texts):
        for sentence in SENTENCES.split(text):
            if sentence.strip():
                above[group(number)] = group(owner.setdefault(sentence.strip(), number))
    found: dict[int, list[int]] = {}
    for number in range(len(texts)):
        found.setdefault(group(number), []).append(number)
    return list(found.values())


def read_statements(path: Path | None, most: int | None = None) -> Statements:
    """Read the statements of a file; None: those that the demo model was shown, each with the fact recalled.

    ``most`` is how many are taken at most, the first.

    Raises:
        OSError, ValueError: as :func:`depass_fast.inputs.records.read_records`; a label that is neither 0 nor 1;
            statements of one label only; too few for :data:`FOLDS` parts.
    """
    if path is None:
        shown = demo_prompts("statements", "train", language="en")[: most or DEMO_COUNT]
        ends = [f"{world().answer(one.entity, one.relation, one.language)}." for one in shown]
        texts = [f"{one.text}{one.recall}{end}" for one, end in zip(shown, ends, strict=True)]
        return Statements.of(texts, [int(one.label) for one in shown])
    records = read_records(path, {"text": str, "label": int})
    for number, one in enumerate(records, 1):
        if one["label"] not in (0, 1):
            raise ValueError(f"{path}, object {number}: the field 'label' is {one['label']}, expected 0 or 1.")
    records = records[:most]
    found = Statements.of([one["text"] for one in records], [one["label"] for one in records])
    counts = torch.bincount(found.labels, minlength=2).tolist()
    if min(counts) < FOLDS or len(found.groups) < FOLDS:
        raise ValueError(
            f"{path}: it has {counts[1]} true and {counts[0]} false statements, in {len(found.groups)} groups that "
            f"share no sentence; a classifier takes {FOLDS} of each at least."
        )
    return found


def held_out_accuracy(statements: Statements, x: Tensor, seed: int) -> float:
    """Return the accuracy on hidden states x (S, D): every statement is asked of a classifier that has not seen it."""
    right = 0.0
    every = range(len(statements.texts))
    for fold in statements.folds(seed):
        found = statements.fit(x, [number for number in every if number not in set(fold)])
        right += statements.accuracy(found, x, fold) * len(fold)
    return right / len(statements.texts)


def truthfulness(found: Classifier) -> Tensor:
    """Return the direction (D,) of truth: its product with a hidden state is the logit of "true" less the bias."""
    return (found.weight[1] - found.weight[0]).float()


def depths(n_layers: int, parts: Sequence[float]) -> list[int]:
    """Return the layers at these parts of a model's depth, the second to the last."""
    return sorted({min(n_layers - 1, max(1, round(part * n_layers))) for part in parts})
