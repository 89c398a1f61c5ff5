"""One workload of the race: it is verified, its methods are timed in turns, and each one's memory is measured."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...baselines.fair_ablation import FairAblation
from ...baselines.neuron_methods import EXACT, FAIR, ONE_BY_ONE, OneAtATime, Shares, methods
from ...core.results import environment
from ...core.timing import interleaved, quantiles
from .memory import peak_bytes
from .subject import NeuronRace, Subject

ROUNDING = 1e-5  # between the two ablations in float64 (whose norms are in float32), of the largest effect
TOLERANCE = 1e-3  # of the library in the model's dtype against the reference backend in float64, of the largest score


@dataclass
class MethodResult:
    """A method's time, memory and quality on one workload. ``seconds`` is the median.

    Where only a sample of neurons was run, ``sample`` is their number and the times are scaled up. The demo model's
    rows hold ``spearman`` and ``top1_overlap``: zero or mean -> spread.
    """

    workload: str
    model: str
    provider: str
    dtype: str
    length: int
    neurons: int
    neurons_per_s: float
    seconds: float
    p20_s: float
    p80_s: float
    runs: int
    sample: int | None
    batch: int | None
    peak_bytes: int | None
    spearman: dict | None = None
    top1_overlap: dict | None = None
    n_prompts: int | None = None
    scaled: str | None = None  # what the time was scaled up from and by, where not all of it was measured
    environment: dict = field(default_factory=dict)

    def as_dict(self) -> dict:
        return asdict(self)


def verify(subject: Subject, neurons: int = 4) -> None:
    """Raise RuntimeError unless both ablations agree, and the library agrees with its oracle."""
    wide = copy.deepcopy(subject.model).double()
    last = subject.model.config.num_hidden_layers - 1
    layers, values = sorted({0, last // 2, last}), torch.full_like(subject.zero, 0.1).double()
    chosen = range(neurons)
    one = OneAtATime(wide).effects(subject.ids, subject.target, layers, values, chosen)
    fair = FairAblation(wide, batch=neurons - 1).effects(subject.ids, subject.target, layers, values, chosen)
    error = float((one - fair).abs().max() / one.abs().max())
    if not error <= ROUNDING:
        raise RuntimeError(f"the two ablations differ by {error:.1e} of the largest effect; nothing is timed.")
    layers = [last // 2]
    exact = methods()[EXACT](subject.model).effects(subject.ids, subject.target, layers, subject.zero)
    oracle = Shares(wide, backend="reference")
    expected = oracle.effects(subject.ids, subject.target, layers, subject.zero)
    error = float((exact.double() - expected).abs().max() / expected.abs().max())
    limit = TOLERANCE if subject.model.dtype == torch.float32 else 0.1
    if not error <= limit:
        raise RuntimeError(f"depass_fast differs from its oracle by {error:.1e} of the largest share.")


def measure(
    work: NeuronRace, runs: int, sample: int, device: str = "cpu", memory: Collection[str] = ()
) -> tuple[list[MethodResult], dict]:
    """Return a row per method, and the search for the fair ablation's batch size.

    *One at a time* runs for ``sample`` neurons, spread over the layers, where there are more. ``memory`` names the
    methods whose memory is measured.
    """
    subject = work.build(device)
    verify(subject)
    taking_part = {name: make(subject.model) for name, make in methods().items()}
    fair = taking_part[FAIR]
    assert isinstance(fair, FairAblation)
    began = time.perf_counter()
    rates = fair.best_batch(subject.ids, subject.target)
    search = {"seconds": time.perf_counter() - began, "neurons_per_s": rates, "batch": fair.batch}

    each = min(subject.width, max(1, sample // len(subject.layers)))
    full = each == subject.width
    scale = 1.0 if full else (1 + subject.neurons) / (1 + each * len(subject.layers))  # in forward passes
    sampled_neurons = {} if full else {"neurons": list(range(0, subject.width, subject.width // each))[:each]}
    calls = {
        name: _call(method, subject, sampled_neurons if name == ONE_BY_ONE else {})
        for name, method in taking_part.items()
    }
    threads, rows = torch.get_num_threads(), []
    for name, values in interleaved(calls, runs).items():
        sampled = name == ONE_BY_ONE and not full
        time_of = quantiles(values * (scale if sampled else 1.0))
        rows.append(
            MethodResult(
                workload=work.name,
                model=work.model,
                provider=name,
                dtype=str(subject.model.dtype).removeprefix("torch."),
                length=len(subject.ids),
                neurons=subject.neurons,
                neurons_per_s=subject.neurons / time_of["median_s"],
                seconds=time_of["median_s"],
                p20_s=time_of["p20_s"],
                p80_s=time_of["p80_s"],
                runs=runs,
                sample=each * len(subject.layers) if sampled else None,
                batch=search["batch"] if name == FAIR else None,
                peak_bytes=peak_bytes(work, name, search["batch"], threads, device) if name in memory else None,
                environment=environment(torch.device(device).type),
            )
        )
    return rows, search


def _call(method: Any, subject: Subject, options: dict) -> Callable[[], Tensor]:
    return lambda: method.effects(subject.ids, subject.target, subject.layers, subject.zero, **options)
