"""All start layers in one sweep against one layer after the other: ``python -m bench.speed.layers``.

Workloads are heads and neurons at N = 20, on the demo model, on layers of width 512, and on a stack of layers of
Llama-2-7B's width (random weights; on a CPU as many as memory takes). Both ways start from the prompt, where a loop
over layers makes a forward pass for every call, and from one trace. Both are verified to give the same scores, then
timed in turns with the GEMM of their shape. Their arithmetic is the same: where one layer alone keeps the machine's
GEMM busy, one sweep gains nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace

import torch

from depass_fast import DePass, Heads, Neurons
from depass_fast.demo import load_demo

from ..core.cli import command, writable
from ..core.models import SHAPES, Model, Shape, build_model, floor_flops, random_prompt
from ..core.results import environment, write_results
from ..core.timing import Gemm, interleaved, quantiles

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}  # the two ways multiply matrices of other sizes
GOAL = 2.0
ONE_BY_ONE, TOGETHER, GEMM = "one by one", "one sweep", "gemm"
KINDS: dict[str, type[Heads] | type[Neurons]] = {"heads": Heads, "neurons": Neurons}
# model, layers of it (None: all), components, tokens
FULL = [
    ("demo", None, "heads", 20),
    ("demo", None, "neurons", 20),
    ("llama-512", 16, "heads", 20),
    ("llama-2-7b", 4, "heads", 20),
]
GPU = [("demo", None, "heads", 20), ("llama-2-7b", 32, "heads", 20)]
TINY = [("llama-tiny", None, "heads", 5), ("llama-tiny", None, "neurons", 5)]


@dataclass
class SweepTime:
    """The time of all start layers, from ``trace`` (one for both ways) or from the prompt."""

    workload: str
    model: str
    provider: str
    source: str
    layers: int
    dtype: str
    ratio: float | None  # one by one / this
    gemm_fraction: float  # of the GEMM rate of this shape in the same run, counting live rows only
    median_s: float
    p20_s: float
    p80_s: float
    runs: int
    max_error: float
    environment: dict = field(default_factory=dict)

    def as_dict(self) -> dict:
        return asdict(self)


def subject(name: str, layers: int | None, length: int, device: str) -> tuple[Shape, DePass, torch.Tensor]:
    """A model in float32, on a GPU in bfloat16, and a prompt for it."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    if name != "demo":
        shape = SHAPES[name]
        shape = shape if layers is None else replace(shape, layers=layers, vocabulary=1024)
        return shape, DePass(build_model(shape, dtype, device=device)), random_prompt(shape, length)
    model: Model = load_demo()[0]
    model = model.to(device, dtype)
    c = model.config
    widths = (c.hidden_size, c.intermediate_size, c.num_hidden_layers, c.num_attention_heads, c.num_key_value_heads)
    ids = torch.randint(5, 500, (length,), generator=torch.Generator().manual_seed(0))
    return Shape(name, *widths, vocabulary=c.vocab_size), DePass(model), ids


def measure(name: str, layers: int | None, components: str, length: int, runs: int, device: str) -> Iterator[SweepTime]:
    """Time both ways.

    Raises:
        RuntimeError: their scores differ; nothing is timed then.
    """
    shape, library, ids = subject(name, layers, length, device)
    kind, dtype = KINDS[components], library.adapter.dtype
    flops = sum(floor_flops(shape, components, length, layer) for layer in range(shape.layers))
    gemm = Gemm(shape, length * shape.heads * shape.layers // 2, dtype, device)
    sources = {"prompt": ids, "trace": library.trace(ids)}
    for source, given in sources.items():

        def one_by_one(given=given) -> list[torch.Tensor]:
            return [library.attribute(given, kind(layer)).scores for layer in range(library.adapter.n_layers)]

        def together(given=given) -> list[torch.Tensor]:
            return [result.scores for result in library.attribute(given, kind(layers="all"), method="exact")]

        pairs = zip(one_by_one(), together(), strict=True)
        error = max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)
        if not error <= TOLERANCE[dtype]:
            raise RuntimeError(f"{name}, {components}: the two ways differ by {error:.1e}; nothing is timed.")
        ways: dict[str, Callable[[], object]] = {ONE_BY_ONE: one_by_one, TOGETHER: together, GEMM: gemm}
        seconds = interleaved(ways, runs, warmup=1)
        rate, times = gemm.rate(seconds[GEMM]) * 1e9, {way: quantiles(seconds[way]) for way in (ONE_BY_ONE, TOGETHER)}
        for way, time_of in times.items():
            yield SweepTime(
                workload=f"{components}, all layers, N={length}",
                model=name,
                provider=way,
                source=source,
                layers=library.adapter.n_layers,
                dtype=str(dtype).removeprefix("torch."),
                ratio=times[ONE_BY_ONE]["median_s"] / time_of["median_s"],
                gemm_fraction=flops / time_of["median_s"] / rate,
                **time_of,
                max_error=error,
                environment=environment(device),
            )


def main(arguments: list[str] | None = None) -> None:
    parser = command("bench.speed.layers", __doc__)
    parser.add_argument("--out", type=writable, help="write the rows to this JSON file, after every workload")
    parser.add_argument("--tiny", "--quick", action="store_true", help="a tiny model, in seconds")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: bfloat16, all layers of the 7B shape")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows: list[SweepTime] = []
    for name, layers, components, length in TINY if options.tiny else FULL if options.device == "cpu" else GPU:
        runs = 2 if options.tiny else 3 if name == "llama-2-7b" else 9
        new = list(measure(name, layers, components, length, runs, options.device))
        rows += new
        for row in new:
            print(
                f"{row.model:11} {row.workload:26} from a {row.source:6} {row.provider:10} {row.median_s:8.4f} s "
                f"[{row.p20_s:.4f}, {row.p80_s:.4f}]  {row.ratio:.2f}×  {row.gemm_fraction:.0%} of GEMM",
                flush=True,
            )
        if options.out:
            write_results(options.out, "layers", rows, options.device)


if __name__ == "__main__":
    main()
