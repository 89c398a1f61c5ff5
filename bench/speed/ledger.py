"""The ledger beside gradient × activation: ``python -m bench.speed.ledger [--out FILE.json]``.

All neurons, heads, modules and tokens of a random model in the shape of SmolLM2-135M, on a prompt of 14 tokens: by the
ledger, by plain autograd of the model, and, of one layer's neurons, by the exact softmax rule; a plain forward pass
stands beside them. They take turns. The ledger is verified against exact propagation under its rule beforehand. Peaks
of memory are measured in a process each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from depass_fast import DePass, Neurons
from depass_fast.evaluate.methods.gradients import inputs_and_gradients

from ..core.cli import command
from ..core.models import SHAPES, Model, build_model, random_prompt
from ..core.peak import fresh_process, measured
from ..core.results import environment, write_results
from ..core.timing import interleaved, quantiles

LEDGER, ANSWERS, HALF = "ledger, shapley", "ledger, shapley, and all answers as results", "ledger, half"
GRADIENT, FORWARD, EXACT = "gradient × activation", "forward pass", "exact softmax, neurons of one layer"
GOALS = {"time": 1.5, "memory": 2.0, "exact": 300.0}  # of the gradient; the last: all layers of EXACT over the ledger
TARGET, TOLERANCE = 7, 1e-5
VOCABULARY = {"smollm2-135m": 49152}  # its logits are part of a gradient


@dataclass
class LedgerTime:
    """The time of one way; ``ratio`` is over gradient × activation, ``all_layers_s`` is a layer's time times layers."""

    workload: str
    model: str
    provider: str
    threads: int
    median_s: float
    p20_s: float
    p80_s: float
    runs: int
    ratio: float
    all_layers_s: float | None
    peak_bytes: int | None
    environment: dict = field(default_factory=dict)

    def as_dict(self) -> dict:
        return asdict(self)


def subject(name: str, length: int) -> tuple[Model, DePass, Tensor]:
    """A random model with the attention that transformers chooses itself, the library on it, and a prompt (N,)."""
    shape = replace(SHAPES[name], vocabulary=VOCABULARY.get(name, SHAPES[name].vocabulary))
    model = build_model(shape).requires_grad_(False)
    model.config._attn_implementation = "sdpa"
    return model, DePass(model, progress=False), random_prompt(shape, length)


def ways(model: Model, library: DePass, ids: Tensor) -> dict[str, Callable[[], object]]:
    """The calls that are timed. Each begins with ids (N,)."""
    layers = model.model.layers
    modules = [layers[0], *(part for layer in layers for part in (layer.self_attn.o_proj, layer.mlp.down_proj))]

    def logit() -> Tensor:
        return model(ids[None], use_cache=False, logits_to_keep=1).logits[0, -1, TARGET]

    def gradient() -> list[Tensor]:
        inputs, (gradients,) = inputs_and_gradients(modules, lambda: [logit()])
        tokens, *parts = ((x * g) for x, g in zip(inputs, gradients, strict=True))
        return [tokens.sum(1), *(part.sum(0) for part in parts)]

    def answers() -> list[object]:
        book = library.ledger(ids, TARGET)
        return [book.neurons(), book.heads(), book.modules(), book.tokens()]

    return {
        LEDGER: lambda: library.ledger(ids, TARGET),
        ANSWERS: answers,
        HALF: lambda: library.ledger(ids, TARGET, rule="half"),
        GRADIENT: gradient,
        FORWARD: torch.no_grad()(logit),
        EXACT: lambda: library.attribute(ids, Neurons(len(layers) // 2), TARGET, method="exact"),
    }


def verify(name: str, length: int) -> float:
    """The ledger's distance from exact propagation under its rule, at a late layer, over the sum of all |scores|.

    Raises:
        RuntimeError: they differ; nothing is timed then.
    """
    _, library, ids = subject(name, length)
    layer = library.adapter.n_layers - 2
    found = library.ledger(ids, TARGET).neurons(layer).scores
    exact = library.attribute(ids, Neurons(layer), TARGET, method="exact", allocation="shapley").scores
    error = float((found - exact).abs().max() / exact.abs().sum())
    if not error <= TOLERANCE:
        raise RuntimeError(f"{name}: the ledger and exact propagation differ by {error:.1e}; nothing is timed.")
    return error


def measure(name: str, length: int, threads: int, runs: int, peaks: dict[str, int | None]) -> list[LedgerTime]:
    """Time all ways in turns on so many threads."""
    torch.set_num_threads(threads)
    layers = SHAPES[name].layers
    times = {way: quantiles(seconds) for way, seconds in interleaved(ways(*subject(name, length)), runs).items()}
    return [
        LedgerTime(
            workload=f"all neurons, heads, modules and tokens, N={length}",
            model=name,
            provider=way,
            threads=threads,
            **timing,
            ratio=timing["median_s"] / times[GRADIENT]["median_s"],
            all_layers_s=layers * timing["median_s"] if way == EXACT else None,
            peak_bytes=peaks.get(way),
            environment=environment("cpu"),
        )
        for way, timing in times.items()
    ]


def show(rows: list[LedgerTime]) -> None:
    """Print the rows of one number of threads."""
    for row in rows:
        peak = "" if row.peak_bytes is None else f"  peak {row.peak_bytes / 2**20:6.1f} MiB"
        print(
            f"{row.model}, {row.threads} threads  {row.provider:44} {row.median_s:8.4f} s "
            f"[{row.p20_s:.4f}, {row.p80_s:.4f}]  {row.ratio:6.2f}× the gradient{peak}",
            flush=True,
        )


def main(arguments: list[str] | None = None) -> None:
    parser = command("bench.speed.ledger", __doc__)
    parser.add_argument("--out", type=Path, help="write the rows to this JSON file")
    parser.add_argument("--tiny", "--quick", action="store_true", help="a tiny model, in seconds")
    parser.add_argument("--length", type=int, default=14, help="tokens of the prompt")
    parser.add_argument("--runs", type=int, help="timed runs per way (default: 7; 2 with --tiny)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory measurement")
    parser.add_argument("--peak", metavar="WAY", help="instead: print the bytes that one way takes at its peak")
    options = parser.parse_args(arguments)
    name, runs = ("llama-tiny", 2) if options.tiny else ("smollm2-135m", 7)
    if options.peak:
        torch.set_num_threads(1)
        model, library, ids = subject(name, options.length)
        ways(model, library, ids[:2])[options.peak]()  # thread pools, and buffers of the model's widths
        print(measured(ways(model, library, ids)[options.peak]))
        return
    print(f"verified: {verify(name, options.length):.1e} from exact propagation")
    peaks: dict[str, int | None] = {}
    for way in () if options.no_memory else (LEDGER, GRADIENT):
        quick = ["--tiny"] if options.tiny else []
        peaks[way] = fresh_process("bench.speed.ledger", "--peak", way, "--length", options.length, *quick)
    rows: list[LedgerTime] = []
    for threads in options.threads:
        rows += (new := measure(name, options.length, threads, options.runs or runs, peaks))
        show(new)
    if options.out:
        write_results(options.out, "ledger", rows, device="cpu", goals=GOALS)


if __name__ == "__main__":
    main()
