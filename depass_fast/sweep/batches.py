"""Windows of prompts, and batches in them: jagged, of similar planned cost, no larger than memory allows.

A window is what is looked at together: its prompts are sorted by cost and cut into batches, and its results are held
until all of them can be given in the prompts' order. Costs come from the planner, a plan per length.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby

import torch

from ..chosen_method import choose_method
from ..components.custom import Custom
from ..planning.planner import make_plan
from ..planning.shapes import RunShape
from ..runtime.memory import available
from .asked import Asked, Prepared
from .failed import FailedPrompt

# a batch is as large as pays: a call takes the host some 50 ms, whatever its size (`python -m bench.sweep`)
BATCH_FLOP = {"cpu": 4e10, "cuda": 5e13}
BATCH_PROMPTS = {"cpu": 64, "cuda": 256}
WINDOW_BATCHES = 4
WINDOW_NUMBERS = 1 << 22  # scores that are held at a time
_SHARE = 0.5  # of the memory that is free, for the prompts of a batch beside the workspace


@dataclass(frozen=True)
class Cost:
    """The planned arithmetic of a prompt, its bytes beside the workspace, and its scores."""

    flop: float
    nbytes: int
    numbers: int


@dataclass
class Costs:
    """The costs of prompts, one plan for all that are alike."""

    asked: Asked
    _known: dict[tuple, Cost] = field(default_factory=dict)

    def of(self, prompt: Prepared) -> Cost:
        length, carried = len(prompt.ids), max(prompt.reads) + 1
        is_fixed = isinstance(self.asked.components, Custom)  # of prompts of one length
        after = 0 if is_fixed else _rounded(length) - length
        key = (length + after, carried + after, len(prompt.reads), len(prompt.spec.items))
        if key not in self._known:
            self._known[key] = self._plan(*key)
        return self._known[key]

    def _plan(self, length: int, until: int, n_reads: int, n_targets: int) -> Cost:
        asked, carried = self.asked, [until]
        gradients = n_targets * n_reads
        given = (asked.components, asked.adapter, asked.settings, carried, [gradients])
        shape = RunShape(
            asked.adapter,
            [length],
            asked.components,
            asked.settings,
            method=choose_method(asked.method, *given),
            carried=carried,
            reads=[carried * n_reads],
            gradients=gradients,
        )
        plan = make_plan(shape)
        estimate = plan.estimates[-1] if plan.method == "adjoint" else plan.estimates[0]
        numbers = plan.n_components * plan.start_layers * gradients
        return Cost(max(plan.flop, 1.0), max(1, estimate.peak_bytes - estimate.workspace_bytes), numbers)


def _rounded(length: int) -> int:
    """Return a number of tokens, rounded up by an eighth at most: prompts of nearly one length share a plan."""
    step = max(4, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step


@dataclass(frozen=True)
class Limits:
    """The most of a batch: ``flop``, ``prompts``, ``nbytes`` (None: not known)."""

    flop: float
    prompts: int
    nbytes: float

    @staticmethod
    def of(device: torch.device, most: int | None = None) -> Limits:
        """Return the limits on a device; ``most`` prompts at a time, by default as many as pay there."""
        kind, free = device.type if device.type in BATCH_FLOP else "cpu", available(device)
        return Limits(BATCH_FLOP[kind], most or BATCH_PROMPTS[kind], math.inf if free is None else free * _SHARE)


def windows(
    prompts: Iterable[Prepared | FailedPrompt], costs: Costs, limits: Limits
) -> Iterator[list[Prepared | FailedPrompt]]:
    """Cut prompts into windows, in their order: a few batches each, one prompt at least."""
    window: list[Prepared | FailedPrompt] = []
    flop, numbers = 0.0, 0
    for prompt in prompts:
        window.append(prompt)
        if isinstance(prompt, Prepared):
            cost = costs.of(prompt)
            flop, numbers = flop + cost.flop, numbers + cost.numbers
        full = flop >= WINDOW_BATCHES * limits.flop or numbers >= WINDOW_NUMBERS
        if full or len(window) >= WINDOW_BATCHES * limits.prompts:
            yield window
            window, flop, numbers = [], 0.0, 0
    if window:
        yield window


def batches(window: Sequence[Prepared], costs: Costs, limits: Limits) -> list[list[Prepared]]:
    """Cut the prompts of a window into batches of similar cost; prompts that are alike go together."""
    ordered = sorted(window, key=lambda prompt: costs.of(prompt).flop)
    flop = [costs.of(prompt).flop for prompt in ordered]
    each = sum(flop) / max(1, math.ceil(sum(flop) / limits.flop), math.ceil(len(ordered) / limits.prompts))
    middle = [before + own / 2 for before, own in zip(accumulate(flop, initial=0.0), flop, strict=False)]
    groups = groupby(zip(ordered, middle, strict=True), key=lambda one: int(one[1] / each))
    return [batch for _, group in groups for batch in _within([one for one, _ in group], costs, limits)]


def _within(batch: Sequence[Prepared], costs: Costs, limits: Limits) -> list[list[Prepared]]:
    """Cut a batch into as few as have room, of nearly the same number of prompts."""
    most = -(-len(batch) // -(-len(batch) // limits.prompts))
    found: list[list[Prepared]] = []
    nbytes = 0.0
    for prompt in batch:
        own = costs.of(prompt).nbytes
        if not found or len(found[-1]) >= most or nbytes + own > limits.nbytes:
            found.append([])
            nbytes = 0.0
        found[-1].append(prompt)
        nbytes += own
    return found
