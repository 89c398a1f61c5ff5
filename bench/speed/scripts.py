"""Scripts that ask layer by layer, through the published interface: ``python -m bench.speed.scripts [--out FILE]``.

Components of every layer, one call per layer, in SmolLM2-135M's shape: by the published algorithm, by
`depass_fast.compat`, and by it with nothing carried ahead. Candidates take turns. Beside wall time stands the time of
the CPU, which other processes disturb less. `floor` is the least that products take, at the GEMM rate measured in the
same run; `check` is what it takes to see that no weight has changed, once per layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from depass_fast.compat import decomposed_state_manager
from depass_fast.compat.kept import fingerprint

from ..baselines.published import Published
from ..core.cli import command, writable
from ..core.models import SHAPES, Shape, build_model
from ..core.results import environment, write_results
from ..core.timing import Gemm

Kind = Literal["attn_head", "attn", "mlp", "tokens"]
KINDS: dict[Kind, str] = {"attn_head": "heads", "attn": "attention", "mlp": "MLP", "tokens": "tokens"}
AGREE = (
    1e-2  # relative to a layer's norm: rounding moves gates over the published limit of 1e-5, below which they are 0
)


@dataclass
class ScriptTime:
    """Medians of one way through all layers, in seconds; ``ratio`` is the median of published / this, turn by turn."""

    workload: str
    model: str
    provider: str
    wall_s: float
    cpu_s: float
    wall_ratio: float
    cpu_ratio: float
    floor_s: float
    check_s: float
    runs: int
    environment: dict = field(default_factory=dict)

    def as_dict(self) -> dict:
        return asdict(self)


def measure(shape: Shape, kind: Kind, length: int, runs: int) -> Iterator[ScriptTime]:
    """A row for every way, after they agreed."""
    model = build_model(shape)
    ids = torch.randint(0, shape.vocabulary, (length,), generator=torch.Generator().manual_seed(0))
    published, manager = Published(model), decomposed_state_manager(model, None, progress=False)

    def of_layer(layer: int) -> Tensor:
        if kind == "tokens":
            return manager.get_middle_to_last_decomposed_state(ids, layer)[0]
        return manager.get_layer_module_decomposed_state(ids, layer, type=kind)

    def compat(ahead: bool = True) -> list[Tensor]:
        manager.get_states(ids)  # a new forward pass
        found = []
        for layer in range(shape.layers):
            found.append(of_layer(layer))
            if not ahead:
                manager._ahead.clear()
        return found

    def by_published() -> list[Tensor]:
        if kind == "tokens":
            return [published.tokens(ids, layer) for layer in range(shape.layers)]
        return [published.module(ids, layer, kind) for layer in range(shape.layers)]

    ways = {"published": by_published, "compat": compat, "compat, one by one": lambda: compat(ahead=False)}
    if kind == "tokens":  # they do not live everywhere, and are carried alone
        del ways["compat, one by one"]
    _verify({name: way() for name, way in ways.items()})
    wall, cpu = timed(ways, runs)
    gemm = Gemm(shape, 1024)
    rate = gemm.rate(timed({"gemm": gemm}, 5)[1]["gemm"]) * 1e9
    check = timed({"check": lambda: fingerprint(manager._traced, ids)}, 5)[1]["check"]
    flops = shape.flops_per_row * sum(rows_and_layers(kind, shape, length))
    for name in ways:
        yield ScriptTime(
            workload=f"{KINDS[kind]} of every layer, N={length}",
            model=shape.name,
            provider=name,
            wall_s=float(np.median(wall[name])),
            cpu_s=float(np.median(cpu[name])),
            wall_ratio=float(np.median(wall["published"] / wall[name])),
            cpu_ratio=float(np.median(cpu["published"] / cpu[name])),
            floor_s=flops / rate,
            check_s=shape.layers * float(np.median(check)),
            runs=runs,
            environment=environment(),
        )


def rows_and_layers(kind: Kind, shape: Shape, length: int) -> Iterator[int]:
    """The rows of every layer's components, times the whole layers that they pass."""
    count = {"attn_head": shape.heads + 1, "tokens": (length + 1) / 2}.get(kind, 2)
    for layer in range(shape.layers):
        ahead = shape.layers - layer - (kind != "tokens")
        yield int(count * length) * ahead


def timed(ways: dict[str, Callable[[], object]], runs: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Seconds of every way in turns, after one call of each: by the clock, and of the CPU."""
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(runs + 1):
        for name, way in ways.items():
            before = time.perf_counter(), time.process_time()
            way()
            if turn:
                wall[name].append(time.perf_counter() - before[0])
                cpu[name].append(time.process_time() - before[1])
    return {name: np.array(t) for name, t in wall.items()}, {name: np.array(t) for name, t in cpu.items()}


def _verify(found: dict[str, list[Tensor]]) -> None:
    for name, states in found.items():
        for layer, (state, expected) in enumerate(zip(states, found["published"], strict=True)):
            off = float((state - expected).norm() / expected.norm())
            if off > AGREE:
                raise RuntimeError(f"{name}, layer {layer}: it is {off:.1e} off the published; nothing is timed.")


def main(arguments: list[str] | None = None) -> None:
    parser = command("bench.speed.scripts", __doc__)
    parser.add_argument("--out", type=writable, help="write the rows to this JSON file, after every workload")
    parser.add_argument("--tiny", "--quick", action="store_true", help="a tiny model, in a second")
    parser.add_argument("--kinds", nargs="+", choices=get_args(Kind), default=get_args(Kind))
    parser.add_argument("--runs", type=int, help="timed turns (default: 5; 1 with --tiny)")
    parser.add_argument("--length", type=int, default=14, help="tokens of the prompt")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    shape, rows = SHAPES["llama-tiny" if options.tiny else "smollm2-135m"], []
    for kind in options.kinds:
        with torch.no_grad():
            new = list(measure(shape, kind, options.length, options.runs or (1 if options.tiny else 5)))
        rows += new
        for row in new:
            print(
                f"{row.workload:32} {row.provider:18} {row.wall_s:7.3f} s {row.wall_ratio:.2f}×, "
                f"CPU {row.cpu_s:7.3f} s {row.cpu_ratio:.2f}×   floor {row.floor_s:.3f} s, check {row.check_s:.3f} s",
                flush=True,
            )
        if options.out:
            write_results(options.out, "scripts", rows, device="cpu")


if __name__ == "__main__":
    main()
