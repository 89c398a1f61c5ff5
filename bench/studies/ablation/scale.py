"""The race in the shape of a real model, on a GPU: each method is timed for as much as it takes to know its rate.

Ablations run for a sample of neurons, and their times are scaled up in forward passes. A fair ablation's batch passes
only the layers after its neuron's, so "all layers" is scaled by the layers that remain. The published algorithm and
exact softmax go layer by layer: "all layers" is one layer's time, scaled by the layers that its components pass. The
sweeps and attribution patching are measured whole. Every row says what it was scaled up from.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ...baselines.fair_ablation import FairAblation
from ...baselines.neuron_methods import (
    ADJOINT,
    EXACT,
    FAIR,
    LINEAR,
    ONE_BY_ONE,
    PATCHING,
    PUBLISHED,
    OneAtATime,
    PublishedShares,
    methods,
)  # fmt: skip
from ...core.models import floor_flops
from ...core.results import environment
from ...core.timing import quantiles, synchronise
from .race import MethodResult
from .subject import NeuronRace, Subject

SLOW = 5.0  # seconds, beyond which a call is timed once


@dataclass(frozen=True)
class Lap:
    """One method's measured call, and the factors that turn its time into that of one layer and of all layers.

    A factor of None: this call says nothing of it. ``sample``: neurons that were run, where that is not all of them;
    ``scaled``: how the figure of all layers was got, where it was not measured.
    """

    method: str
    call: Callable[[], object]
    one_layer: float | None
    all_layers: float | None
    sample: int | None = None
    scaled: str | None = None
    batch: int | None = None


def laps(subject: Subject, model: str, sample: int) -> Iterator[Lap]:
    """The calls of all methods, the cheapest first."""
    made = {name: make(subject.model) for name, make in methods().items()}
    ids, target, zero = subject.ids, subject.target, subject.zero
    depth, width = len(subject.model.model.layers), subject.width
    every, layer = range(depth), [0]

    def whole(name: str, layers: range | list[int]) -> Callable[[], object]:
        return lambda: made[name].effects(ids, target, layers, zero)

    for name in (PATCHING, LINEAR, ADJOINT):
        yield Lap(name, whole(name, layer), 1.0, None)
        yield Lap(name, whole(name, every), None, 1.0)
    passes = _passes(subject, model)
    yield Lap(EXACT, whole(EXACT, layer), 1.0, passes, scaled="one layer, by the floor's FLOP of every start layer")
    few = list(range(0, width, max(1, width // sample)))[:sample]
    one = made[ONE_BY_ONE]
    assert isinstance(one, OneAtATime)
    yield Lap(
        ONE_BY_ONE,
        lambda: one.effects(ids, target, layer, zero, few),
        (1 + width) / (1 + len(few)),  # the clean pass is one of them
        (1 + depth * width) / (1 + len(few)),
        len(few),
        "forward passes",
    )
    fair = made[FAIR]
    assert isinstance(fair, FairAblation)
    fair.best_batch(ids, target, 0, (64, 128, 256))
    some = list(range(min(width, 4 * fair.batch)))
    passed, batches = len(some) / fair.batch, width / fair.batch  # beside the clean pass
    after = sum(depth - 1 - start for start in every) / (depth - 1)  # layers that batches pass, over those of layer 0
    yield Lap(
        FAIR,
        lambda: fair.effects(ids, target, layer, zero, some),
        (1 + batches) / (1 + passed),
        (1 + batches * after) / (1 + passed),
        len(some),
        "forward passes, by the layers that remain",
        fair.batch,
    )
    published = made[PUBLISHED]
    assert isinstance(published, PublishedShares)
    text = f"one layer in {published.groups(len(ids))} groups, by the floor's FLOP of every start layer"
    yield Lap(PUBLISHED, whole(PUBLISHED, layer), 1.0, passes, scaled=text)


def _passes(subject: Subject, model: str) -> float:
    """The floor's FLOP of the neurons of all start layers, over that of layer 0; at least 1."""
    shape = NeuronRace(model, False).shape
    each = [floor_flops(shape, "neurons", len(subject.ids), layer) for layer in range(shape.layers)]
    return sum(each) / each[0]


def race(
    model: str, device: str, length: int, sample: int, runs: int, report: Callable[[MethodResult], None]
) -> list[str]:
    """Report a row of one layer and one of all layers per method; return those that failed, with their errors."""
    subject, failed = NeuronRace(model, False, length).build(device), []
    for lap in laps(subject, model, sample):
        error = None
        try:
            for row in _run(subject, model, lap, runs):
                report(row)
        except (RuntimeError, MemoryError, ValueError) as problem:  # torch's out of memory is a RuntimeError
            error = f"{lap.method}: {type(problem).__name__}: {problem}"
        if error:  # not in the handler, where the error still holds the tensors of its frames
            failed.append(error)
        gc.collect()
        if subject.ids.is_cuda:
            torch.cuda.empty_cache()
    return failed


def _run(subject: Subject, model: str, lap: Lap, runs: int) -> list[MethodResult]:
    cuda, before = subject.ids.is_cuda, 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    lap.call()  # compiles, and fills the caches of the allocator
    synchronise()
    peak = torch.cuda.max_memory_allocated() - before if cuda else None
    first = _timed(lap.call)
    more = [_timed(lap.call) for _ in range(runs - 1 if first < SLOW else 0)]
    values = np.array([first, *more])
    depth, rows = len(subject.model.model.layers), []
    for factor, all_layers in ((lap.one_layer, False), (lap.all_layers, True)):
        if factor is None:
            continue
        timing, neurons = quantiles(values * factor), subject.width * (depth if all_layers else 1)
        measured = all_layers == (lap.one_layer is None) and lap.sample is None
        rows.append(
            MethodResult(
                workload=NeuronRace(model, all_layers).name,
                model=model,
                provider=lap.method,
                dtype=str(subject.model.dtype).removeprefix("torch."),
                length=len(subject.ids),
                neurons=neurons,
                neurons_per_s=neurons / timing["median_s"],
                seconds=timing["median_s"],
                p20_s=timing["p20_s"],
                p80_s=timing["p80_s"],
                runs=len(values),
                sample=lap.sample,
                batch=lap.batch,
                peak_bytes=peak,
                scaled=None if measured else lap.scaled,
                environment=environment(subject.ids.device.type),
            )
        )
    return rows


def _timed(call: Callable[[], object]) -> float:
    synchronise()
    began = time.perf_counter()
    call()
    synchronise()
    return time.perf_counter() - began
