"""Launch configurations measured on this GPU: ``python -m bench.speed.tune [--out tuned.json] [--write]``.

For the buckets of :mod:`depass_fast.kernels.launch` the candidates are compiled, in several processes, and timed.
``--write`` puts the winners into ``tuned.json`` beside the kernels, where they are at least 3 % faster and slower in no
case of the bucket; they are for the GPU's architecture, or for its name alone. ``--products`` times the MLP's two
products in both ways: torch's GEMM with the allocation as a kernel of its own, and :mod:`bench.kernels.fused_products`.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton

from depass_fast.backends.triton.pieces import make_piece, query_tiles
from depass_fast.kernels import allocation, attention, launch, probabilities
from depass_fast.runtime.products import accumulate
from depass_fast.state.layout import Components, Layout

from ..core.cli import command, writable
from ..kernels import fused_products

BF16 = torch.bfloat16


@dataclass(frozen=True)
class TunedKernel:
    """A kernel at a shape: ``make`` returns a call that returns its output, and the least bytes that it must move."""

    kernel: str
    name: str
    make: Callable[[torch.device], tuple[Callable[[], torch.Tensor], float]]
    candidates: tuple[dict, ...]


def _grid(**choices: tuple) -> tuple[dict, ...]:
    return tuple(dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values()))


def _allocate(segments: int, count: int, n: int) -> Callable:
    def make(device: torch.device) -> tuple[Callable, float]:
        gates = torch.randn(segments * count, n, device=device).mul_(0.05).to(BF16)
        act = torch.randn(segments, n, device=device).to(BF16)
        starts = torch.arange(segments + 1, device=device) * count
        where = allocation.Segments(starts, torch.arange(segments, device=device), count)
        alive = torch.ones(len(gates), dtype=torch.uint8, device=device)
        out = gates.clone()

        def call() -> torch.Tensor:  # in place: its own output is as good an input
            allocation.allocate(out, where, act, "softmax", 0.1, alive)
            return out

        return call, 3.0 * gates.numel() * 2

    return make


def _mix(layout: Layout, part: tuple[range, int, int | None], heads: int, kv: int, head_dim: int) -> Callable:
    def make(device: torch.device) -> tuple[Callable, float]:
        lengths = np.bincount(layout.prompt)
        tile = launch.mix_tile(int(lengths.max()), heads // kv, BF16)
        piece = make_piece(layout, *part, tile, heads // kv, device)
        n = len(layout.packed)
        q, k = (torch.randn(n, h, head_dim, device=device).to(BF16) for h in (heads, kv))
        frozen = probabilities.Frozen(q, k, head_dim**-0.5)
        packed = torch.from_numpy(layout.packed.astype(np.int32)).to(device)
        tiles = query_tiles(lengths, tile, heads // kv, device)
        lse = probabilities.log_sum_exp(frozen, packed, tiles, tile)
        values = torch.randn(len(piece.rows), kv * head_dim, device=device).half()  # the way of a bfloat16 model
        out, ones = values.new_empty(len(values), heads * head_dim), torch.ones(len(values), device=device)
        where = (values, piece.keys, piece.items, frozen, lse, tile, piece.longest, out)
        p = None
        if max(lengths) > 64:
            longest = int(max(lengths))
            p = probabilities.stored_probabilities(frozen, lse, packed, tiles, tile, longest, values.dtype)
        scales = attention.RowScales(ones, torch.ones_like(ones), 1)
        call = lambda: attention.mix(*where, p, scales)  # noqa: E731
        return call, 2.0 * (values.numel() + out.numel())

    return make


def cases() -> Iterator[TunedKernel]:
    wide = _grid(BM=(16, 32, 64), BI=(64, 128), STAGES=(3, 4), num_warps=(4, 8))
    wide = tuple(c for c in wide if c["BM"] * c["BI"] in (2048, 4096))  # larger ones take too many registers
    few = _grid(BM=(32,), BI=(64, 128, 256), STAGES=(1,), num_warps=(1, 2, 4, 8))
    yield TunedKernel("allocate", "2 x 11009", _allocate(2, 11009, 11008), wide)
    yield TunedKernel("allocate", "4 x 11009", _allocate(4, 11009, 11008), wide)
    yield TunedKernel("allocate", "60 x 512", _allocate(60, 512, 11008), wide)
    yield TunedKernel("allocate", "600 x 21", _allocate(600, 21, 11008), few)
    tokens = tuple(Components.tokens(tuple(map(str, range(n))), ("rest",), {0}) for n in (20,) * 64)
    short = Layout.of(tokens, np.arange(65) * 20)
    neurons = Layout.of((Components.everywhere(tuple(map(str, range(1600))), ()),), np.array([0, 20]))
    long = Layout.of((Components.tokens(tuple(map(str, range(512))), ("rest",), {0}),), np.array([0, 512]))
    one = _grid(BM=(1,), num_warps=(2, 4, 8), num_stages=(1, 2, 3, 4))
    many = _grid(BM=(1,), BK=(32, 64, 128), num_warps=(4, 8), num_stages=(2, 3, 4))
    yield TunedKernel("mix", "neurons, N=20", _mix(neurons, (range(1), 0, None), 32, 32, 128), one)
    yield TunedKernel("mix", "64 prompts, N=20", _mix(short, (range(64), 0, None), 32, 32, 128), one)
    yield TunedKernel("mix", "neurons, N=20, GQA 4", _mix(neurons, (range(1), 0, None), 32, 8, 128), one)
    yield TunedKernel("mix", "tokens, N=512", _mix(long, (range(1), 64, 192), 32, 32, 128), many)
    yield TunedKernel("mix", "tokens, N=512, GQA 4", _mix(long, (range(1), 64, 192), 32, 8, 128), many)


def _with(kernel: str, config: dict) -> mock._patch:
    return mock.patch.object(launch, "tuned", lambda device, name, bucket: config if name == kernel else {})


def _compile(place: tuple[int, int]) -> str | None:
    """Run one candidate once, in a process of its own, so that it is in the cache. Return the error, if any."""
    case = list(cases())[place[0]]
    try:
        with _with(case.kernel, case.candidates[place[1]]):
            case.make(torch.device("cuda"))[0]()
        torch.cuda.synchronize()
    except Exception as error:  # out of shared memory, or the compiler's
        return f"{type(error).__name__}: {error}"[:120]
    return None


def _milliseconds(call: Callable[[], object], warmup: int, rep: int) -> float:
    """The median time of a call, after about ``warmup`` ms and over about ``rep`` ms."""
    median: Any = triton.testing.do_bench(call, warmup=warmup, rep=rep, return_mode="median")
    return median


def tune(workers: int, only: str | None, keep: Callable[[dict], object]) -> dict[str, dict[str, dict]]:
    """The best configuration per kernel and bucket, see :func:`winner`. ``keep`` is given what is known after a case.

    A bucket's configuration may change with its next case.
    """
    every = [(i, c) for i, c in enumerate(cases()) if only is None or only in f"{c.kernel} {c.name}"]
    places = [(i, j) for i, case in every for j in range(len(case.candidates))]
    began = time.monotonic()
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        failed = dict(zip(places, pool.map(_compile, places), strict=True))
    print(f"{len(places)} candidates compiled in {time.monotonic() - began:.0f} s", flush=True)
    measured: dict[tuple[str, str], list[list[tuple[float, dict]]]] = {}  # bucket -> case -> candidates
    for i, case in every:
        buckets: set[tuple[str, str]] = set()
        spy = mock.patch.object(launch, "tuned", lambda d, k, b, buckets=buckets: buckets.add((k, b)) or {})
        call, moved = case.make(torch.device("cuda"))
        with spy:
            call()
            base = _milliseconds(call, warmup=5, rep=40)
        found = []
        for j, config in enumerate(case.candidates):
            if failed[i, j]:
                continue
            with _with(case.kernel, config):
                found.append((_milliseconds(call, warmup=3, rep=25), config))
        found.sort(key=lambda pair: pair[0])
        print(f"{case.kernel} {case.name}: computed {base:.3f} ms ({moved / base / 1e9:.2f} TB/s)", flush=True)
        for ms, config in found[:4] + found[-1:]:
            print(f"    {ms:.3f} ms ({moved / ms / 1e9:.2f} TB/s) {config}")
        for message in {m for (k, _), m in failed.items() if k == i and m}:
            print(f"    failed: {message}")
        for place in buckets:
            measured.setdefault(place, []).append([(ms / base, config) for ms, config in found])
        keep(winners(measured))
    return winners(measured)


def winners(measured: dict[tuple[str, str], list[list[tuple[float, dict]]]]) -> dict[str, dict[str, dict]]:
    """The winning configurations: kernel -> bucket -> configuration."""
    best: dict[str, dict[str, dict]] = {}
    for (kernel, bucket), every_case in measured.items():
        if config := winner(every_case):
            best.setdefault(kernel, {})[bucket] = config
    return best


def winner(measured: list[list[tuple[float, dict]]]) -> dict | None:
    """The fastest configuration of a bucket, by the geometric mean over its cases; None if it gains less than 3 %.

    ``measured`` holds, per case, pairs of a configuration's time relative to the computed one's and that configuration.
    A configuration that failed or was slower in any case is out.
    """
    ratios: dict[str, list[float]] = {}
    for found in measured:
        for ratio, config in found:
            ratios.setdefault(json.dumps(config), []).append(ratio)
    means = {
        name: math.prod(values) ** (1 / len(values))
        for name, values in ratios.items()
        if len(values) == len(measured) and max(values) <= 1
    }
    name = min(means, key=means.__getitem__, default=None)
    return None if name is None or means[name] > 0.97 else json.loads(name)


def products(segments: int, count: int, width: int, n: int) -> None:
    """Time both ways through the MLP's products, and their parts, in ms and TFLOP/s."""
    device, r = torch.device("cuda"), segments * count
    x = torch.randn(r, width, device=device).mul_(width**-0.5).to(BF16)
    state = torch.randn(r, width, device=device)
    w_gate = torch.randn(n, width, device=device).to(BF16)
    w_down = torch.randn(width, n, device=device).mul_(0.01).to(BF16)
    act, g = torch.randn(segments, n, device=device).to(BF16), torch.empty(r, n, dtype=BF16, device=device)
    starts = np.arange(segments + 1) * count
    where = allocation.Segments(torch.from_numpy(starts).to(device), torch.arange(segments, device=device), count)
    alive, fallback = torch.ones(r, dtype=torch.uint8, device=device), torch.zeros(r, device=device)
    tiles, firsts = fused_products.row_tiles(starts, fused_products.product_config(BF16, device)["BM"])
    tiles, firsts = torch.from_numpy(tiles).to(device), torch.from_numpy(firsts).to(device)
    log_z = fused_products.gate(x, w_gate, tiles, firsts, where.starts, 0.1, g)
    half = torch.empty(r, width, dtype=BF16, device=device)
    ways = {
        "library gate": lambda: torch.mm(x, w_gate.T, out=g),
        "allocate": lambda: allocation.allocate(g, where, act, "softmax", 0.1, alive),
        "library down, bf16 out": lambda: torch.mm(g, w_down.T, out=half),
        "library down into float32": lambda: accumulate(state, g, w_down.T),
        "fused gate and log Z": lambda: fused_products.gate(x, w_gate, tiles, firsts, where.starts, 0.1, g),
        "fused down": lambda: fused_products.down(
            state, g, w_down, act, where.recorded, log_z, tiles, where.starts, 0.1, fallback
        ),
    }
    print(f"products of {segments} segments of {count} rows, D={width}, I={n}")
    for name, call in ways.items():
        ms = _milliseconds(call, warmup=10, rep=60)
        rate = "" if name == "allocate" else f"  {2 * r * width * n / ms / 1e9:.0f} TFLOP/s"
        print(f"    {name:26} {ms:8.3f} ms{rate}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = command("bench.speed.tune", __doc__)
    parser.add_argument("--write", action="store_true", help="keep the winners in kernels/tuned.json")
    parser.add_argument(
        "--out", type=writable, help="write them to this file, after every case, in the form of tuned.json"
    )
    parser.add_argument(
        "--by",
        choices=("architecture", "name"),
        default="architecture",
        help="whom they are for (default: architecture)",
    )
    parser.add_argument("--workers", type=int, default=12, help="processes that compile")
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--products", action="store_true", help="time the MLP's products, too")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("bench.speed.tune: no GPU here.")
    key = torch.cuda.get_device_name() if options.by == "name" else launch.architecture(0)

    def keep(best: dict) -> None:
        if options.out:
            options.out.write_text(json.dumps({key: best}, indent=1) + "\n")

    with torch.no_grad():
        best = tune(options.workers, options.only, keep)
        print(json.dumps({key: best}, indent=1), flush=True)
        if options.write:
            table = json.loads(launch.TUNED.read_text()) if launch.TUNED.is_file() else {}
            launch.TUNED.write_text(json.dumps(merged(table, key, best, bool(options.only)), indent=1) + "\n")
        if options.products:
            products(4, 11009, 4096, 11008)
            products(64 * 20, 11, 4096, 11008)


def merged(table: dict, key: str, best: dict[str, dict[str, dict]], partly: bool) -> dict:
    """The table with the winners under ``key``; ``partly``: buckets that were not measured stay."""
    kept = table.get(key, {}) if partly else {}
    return table | {key: {kernel: kept.get(kernel, {}) | best.get(kernel, {}) for kernel in {**kept, **best}}}


if __name__ == "__main__":
    main()
