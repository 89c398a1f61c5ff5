"""Products of float32 on a CPU by torch's two libraries: ``python -m bench.speed.products [--out FILE] [--tiny]``.

First the two products of an MLP alone, as torch multiplies and as the engine does, which takes oneDNN where
:func:`depass_fast.runtime.products.one_dnn_is_faster` says so. Then attributions with and without that choice. Both
take turns. On a CPU where the engine multiplies as torch does, all ratios are one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np
import torch

from depass_fast import DePass, Heads, Neurons, Tokens
from depass_fast.backends.torch.division import TARGET_NEURONS
from depass_fast.runtime import products

from ..core.cli import command, writable
from ..core.models import SHAPES, Shape, build_model
from ..core.results import write_results
from ..core.timing import interleaved

LENGTH = 8  # tokens of a prompt


@dataclass
class ProductTime:
    """Medians in seconds, and the median ratio of a turn. ``gflops`` and ``error`` are None for attributions.

    error: of the engine's product against float64, in units of torch's.
    """

    workload: str
    model: str
    torch_s: float
    engine_s: float
    ratio: float
    gflops: tuple[float, float] | None
    error: float | None
    runs: int

    def as_dict(self) -> dict:
        return asdict(self)


def matrices(shape: Shape, rows: int, runs: int) -> Iterator[ProductTime]:
    """Time the products of a model's MLP with so many rows."""
    make = torch.Generator().manual_seed(0)
    hidden, width = shape.hidden, shape.intermediate
    part = min(width, TARGET_NEURONS)
    for name, n, k in (("gate", width, hidden), ("down", hidden, width), ("down, of some neurons", hidden, part)):
        x, w = torch.randn(rows, k, generator=make), torch.randn(n, width if name != "gate" else k, generator=make)
        w, repeats = w[:, :k].T, max(1, (1 << 31) // (rows * n * k))
        out = torch.zeros(rows, n)
        found = _turns(lambda out=out, x=x, w=w: products.accumulate(out, x, w), runs, repeats)
        exact = x.double() @ w.double()
        errors = [float((one - exact).norm()) for one in (products.product(x, w), x @ w)]
        flops = 2e-9 * rows * n * k
        yield _row(
            f"{name}, {rows} rows", shape, found, errors[0] / errors[1], lambda s, flops=flops: flops / s, repeats
        )


def attributions(shape: Shape, runs: int) -> Iterator[ProductTime]:
    """Time attributions of a prompt of random tokens."""
    engine = DePass(build_model(shape), progress=False)
    trace = engine.trace(torch.randint(0, shape.vocabulary, (LENGTH,), generator=torch.Generator().manual_seed(0)))
    neurons = Neurons(layers="all")
    for name, call in {
        "tokens": lambda: engine.attribute(trace, Tokens()),
        "heads of all layers": lambda: engine.attribute(trace, Heads(layers="all")),
        "neurons of the middle layer": lambda: engine.attribute(trace, Neurons(shape.layers // 2)),
        "neurons of all layers, adjoint": lambda: engine.attribute(trace, neurons),
        "neurons of all layers, shapley": lambda: engine.attribute(trace, neurons, allocation="shapley"),
    }.items():
        yield _row(f"{name}, N={LENGTH}", shape, _turns(call, runs))


def _turns(call: Callable[[], object], runs: int, repeats: int = 1) -> dict[str, np.ndarray]:
    def by_torch() -> None:
        with as_torch():
            for _ in range(repeats):
                call()

    def by_engine() -> None:
        for _ in range(repeats):
            call()

    return interleaved({"torch": by_torch, "engine": by_engine}, runs)


@contextmanager
def as_torch() -> Iterator[None]:
    """Have the engine multiply as torch does."""
    kept = products.one_dnn_is_faster
    products.one_dnn_is_faster = lambda: False
    try:
        yield
    finally:
        products.one_dnn_is_faster = kept


def _row(
    workload: str,
    shape: Shape,
    found: dict[str, np.ndarray],
    error: float | None = None,
    rate: Callable[[float], float] | None = None,
    repeats: int = 1,
) -> ProductTime:
    by_torch, by_engine = (float(np.median(found[name])) / repeats for name in ("torch", "engine"))
    ratio = float(np.median(found["torch"] / found["engine"]))
    rates = None if rate is None else (rate(by_torch), rate(by_engine))
    return ProductTime(workload, shape.name, by_torch, by_engine, ratio, rates, error, len(found["torch"]))


def main(arguments: list[str] | None = None) -> None:
    parser = command("bench.speed.products", __doc__)
    parser.add_argument("--out", type=writable, help="write the rows to this JSON file")
    parser.add_argument("--tiny", "--quick", action="store_true", help="a tiny model, in seconds")
    parser.add_argument("--runs", type=int, help="timed turns (default: 5; 1 with --tiny)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    small, runs = SHAPES["llama-tiny" if options.tiny else "smollm2-135m"], options.runs or (1 if options.tiny else 5)
    rows: list[ProductTime] = []
    with torch.no_grad():
        for count in (8, 256) if options.tiny else (8, 64, 512):
            for shape in [small] if options.tiny else [small, SHAPES["llama-2-7b"]]:
                rows += matrices(shape, count, runs)
        rows += attributions(small, runs)
    for row in rows:
        print(f"{row.model:14} {row.workload:36} {row.torch_s:9.4f} s {row.engine_s:9.4f} s  {row.ratio:5.2f}×")
    if options.out:
        write_results(options.out, "products", rows, "cpu", one_dnn=products.one_dnn_is_faster())


if __name__ == "__main__":
    main()
