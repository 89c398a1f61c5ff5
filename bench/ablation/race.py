"""One workload of the race: built, verified, timed in turns, its memory measured in a process per method."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from ..harness import SHAPES, build_model, environment, interleaved, quantiles, random_prompt
from .fair import FairAblation
from .memory import peak_bytes
from .methods import EXACT, FAIR, ONE_BY_ONE, methods
from .quality import demo_model, questions

ROUNDING = 1e-5  # between the two ablations in float64 (whose norms are in float32), of the largest effect
TOLERANCE = 1e-3  # of the library in the model's dtype against the reference backend in float64, of the largest score


@dataclass(frozen=True)
class Workload:
    """Neurons of layer 0, or of every layer, of a random model's random prompt or of the demo's first question."""

    model: str  # "demo" or a name of harness.SHAPES
    all_layers: bool
    length: int = 16  # of a random model's prompt

    @property
    def name(self) -> str:
        return "neurons of all layers" if self.all_layers else "neurons of layer 0"

    def build(self, device: str = "cpu") -> Subject:
        if self.model == "demo":
            model, tokenizer = demo_model(device)
            question = questions(tokenizer, 2, device)[0]
            return Subject(model, question.ids, question.target, self.all_layers)
        shape = SHAPES[self.model]
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        model = build_model(shape, dtype, device=device).requires_grad_(False)
        return Subject(model, random_prompt(shape, self.length).to(device), 7, self.all_layers)


@dataclass
class Subject:
    """A model and what is asked of it, with activations set to zero."""

    model: nn.Module
    ids: Tensor
    target: int
    all_layers: bool

    @property
    def layers(self) -> range:
        return range(self.model.config.num_hidden_layers if self.all_layers else 1)

    @property
    def width(self) -> int:
        return self.model.config.intermediate_size

    @property
    def zero(self) -> Tensor:
        return torch.zeros(self.model.config.num_hidden_layers, self.width, device=self.ids.device)

    @property
    def neurons(self) -> int:
        return len(self.layers) * self.width


@dataclass
class Row:
    """A measured fact. ``seconds`` is the median; where only a sample was run, it is scaled up and ``sample`` says of
    how many neurons. ``spearman`` and ``top1_overlap`` are filled in for the demo model: zero or mean -> spread."""

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
    environment: dict = field(default_factory=dict)

    def as_dict(self) -> dict:
        return asdict(self)


def verify(subject: Subject, neurons: int = 4) -> None:
    """Raises RuntimeError unless both ablations give the same effects, and the library its oracle's shares."""
    wide = copy.deepcopy(subject.model).double()
    last = subject.model.config.num_hidden_layers - 1
    layers, values = sorted({0, last // 2, last}), torch.full_like(subject.zero, 0.1).double()
    chosen = range(neurons)
    one = methods()[ONE_BY_ONE](wide).effects(subject.ids, subject.target, layers, values, chosen)
    fair = FairAblation(wide, batch=neurons - 1).effects(subject.ids, subject.target, layers, values, chosen)
    error = float((one - fair).abs().max() / one.abs().max())
    if not error <= ROUNDING:
        raise RuntimeError(f"the two ablations differ by {error:.1e} of the largest effect; nothing is timed.")
    layers = [last // 2]
    exact = methods()[EXACT](subject.model).effects(subject.ids, subject.target, layers, subject.zero)
    oracle = methods()[EXACT](wide)
    oracle.library.options = oracle.library.options.updated({"backend": "reference"})
    expected = oracle.effects(subject.ids, subject.target, layers, subject.zero)
    error = float((exact.double() - expected).abs().max() / expected.abs().max())
    limit = TOLERANCE if subject.model.dtype == torch.float32 else 0.1
    if not error <= limit:
        raise RuntimeError(f"depass_fast differs from its oracle by {error:.1e} of the largest share.")


def measure(
    work: Workload, runs: int, sample: int, device: str = "cpu", memory: Collection[str] = ()
) -> tuple[list[Row], dict]:
    """A row per method, and how the batch size of the fair ablation was found.

    One at a time is run for ``sample`` neurons, spread over the layers, where there are more. ``memory`` names the
    methods whose memory is measured.
    """
    subject = work.build(device)
    verify(subject)
    taking_part = {name: make(subject.model) for name, make in methods().items()}
    began = time.perf_counter()
    rates = taking_part[FAIR].best_batch(subject.ids, subject.target)
    search = {"seconds": time.perf_counter() - began, "neurons_per_s": rates, "batch": taking_part[FAIR].batch}

    each = min(subject.width, max(1, sample // len(subject.layers)))
    full = each == subject.width
    scale = 1.0 if full else (1 + subject.neurons) / (1 + each * len(subject.layers))  # in forward passes
    calls = {}
    for name, method in taking_part.items():
        some = {} if full or name != ONE_BY_ONE else {"neurons": range(0, subject.width, subject.width // each)}
        some = {"neurons": list(some["neurons"])[:each]} if some else {}
        calls[name] = _call(method, subject, some)
    threads, rows = torch.get_num_threads(), []
    for name, values in interleaved(calls, runs).items():
        sampled = name == ONE_BY_ONE and not full
        time_of = quantiles(values * (scale if sampled else 1.0))
        rows.append(
            Row(
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


def _call(method: object, subject: Subject, some: dict) -> Callable[[], Tensor]:
    return lambda: method.effects(subject.ids, subject.target, subject.layers, subject.zero, **some)
