"""All start layers in one sweep against one layer after the other: ``python -m bench.layers``.

Heads and neurons at N = 20, on the demo model and on a stack of layers of Llama-2-7B's width (random weights, as many
as memory takes). From one trace for both ways, and with a forward pass for every call, as a loop over layers has it.
Both ways are verified to give the same scores before they are timed, in turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from depass_fast import ComponentKind, DePass, Heads, Neurons
from depass_fast.demo import load_demo

from .harness import SHAPES, build_model, environment, interleaved, quantiles, random_prompt, write_results

TOLERANCE, GOAL = 1e-5, 2.0
ONE_BY_ONE, TOGETHER = "one by one", "one sweep"
KINDS: dict[str, type[ComponentKind]] = {"heads": Heads, "neurons": Neurons}
# model, layers of it (None: all), components, tokens
FULL = [("demo", None, "heads", 20), ("demo", None, "neurons", 20), ("llama-2-7b", 4, "heads", 20)]
TINY = [("llama-tiny", None, "heads", 5), ("llama-tiny", None, "neurons", 5)]


@dataclass
class Row:
    """A measured fact: all start layers, from ``trace`` (one for both ways) or from the prompt."""

    workload: str
    model: str
    provider: str
    source: str
    layers: int
    ratio: float | None  # one by one / this
    median_s: float
    p20_s: float
    p80_s: float
    runs: int
    max_error: float
    environment: dict = field(default_factory=dict)

    def as_dict(self) -> dict:
        return asdict(self)


def measure(name: str, layers: int | None, components: str, length: int, runs: int) -> Iterator[Row]:
    """Both ways. RuntimeError where their scores differ: nothing is timed then."""
    if name == "demo":
        model, ids = load_demo()[0], torch.randint(5, 500, (length,), generator=torch.Generator().manual_seed(0))
    else:
        shape = SHAPES[name]
        shape = shape if layers is None else replace(shape, layers=layers, vocabulary=1024)
        model, ids = build_model(shape), random_prompt(shape, length)
    library, kind = DePass(model), KINDS[components]
    sources = {"trace": library.trace(ids), "prompt": ids}
    for source, given in sources.items():

        def one_by_one(given=given) -> list[torch.Tensor]:
            return [library.attribute(given, kind(layer)).scores for layer in range(library.adapter.n_layers)]

        def together(given=given) -> list[torch.Tensor]:
            return [result.scores for result in library.attribute(given, kind(layers="all"), method="exact")]

        pairs = zip(one_by_one(), together(), strict=True)
        error = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
        if not error <= TOLERANCE:
            raise RuntimeError(f"{name}, {components}: the two ways differ by {error:.1e}; nothing is timed.")
        ways: dict[str, Callable[[], object]] = {ONE_BY_ONE: one_by_one, TOGETHER: together}
        times = {way: quantiles(seconds) for way, seconds in interleaved(ways, runs, warmup=0).items()}
        for way, time_of in times.items():
            yield Row(
                workload=f"{components}, all layers, N={length}",
                model=name,
                provider=way,
                source=source,
                layers=library.adapter.n_layers,
                ratio=times[ONE_BY_ONE]["median_s"] / time_of["median_s"],
                **time_of,
                max_error=error,
                environment=environment(),
            )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.layers", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the rows to this JSON file, after every workload")
    parser.add_argument("--tiny", "--quick", action="store_true", help="a tiny model, in seconds")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    for name, layers, components, length in TINY if options.tiny else FULL:
        runs = 2 if options.tiny else 3 if name != "demo" else 9
        new = list(measure(name, layers, components, length, runs))
        rows += new
        for row in new:
            print(
                f"{row.model:11} {row.workload:26} from a {row.source:6} {row.provider:10} {row.median_s:8.4f} s "
                f"[{row.p20_s:.4f}, {row.p80_s:.4f}]  {row.ratio:.2f}×",
                flush=True,
            )
        if options.out:
            write_results(options.out, "layers", rows)


if __name__ == "__main__":
    main()
