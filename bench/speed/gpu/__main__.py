"""Speed and memory on a GPU: ``python -m bench.speed.gpu --out FILE.json`` (at most 8 minutes), ``--tiny`` anywhere.

First every provider is verified on small models: the library's backends in every dtype against the reference backend in
float64, torch.compile in the dtype that is timed, the published algorithm in that dtype against itself in float64. Then
the machine's own rates are measured, random models of real shapes are built on the device, in bfloat16, and the
providers are timed in turns. ``--tiny`` runs all of it with tiny shapes, on a CPU too, so that the first run on a GPU
is a productive one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from ...core.cli import command
from ...core.models import SHAPES, build_model
from ...core.results import Row, environment, write_results
from ...kernels.checks import verify as verify_kernels
from .measurement import Session, machine, measure, profiled, providers_of
from .verification import VERIFIED, VERIFIED_TINY, Errors, verify
from .workloads import backends, full, provider, tiny


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = command("bench.speed.gpu", __doc__)
    parser.add_argument("--out", type=Path, help="write the rows to this JSON file, after every workload")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on a CPU too: checks that it runs")
    parser.add_argument(
        "--models", nargs="+", default=["llama-2-7b", "llama-3.1-8b", "qwen2-7b"], choices=tuple(SHAPES)
    )
    parser.add_argument("--only", help="workloads whose name contains this")
    parser.add_argument("--minutes", type=float, default=7.0, help="no workload is begun after this time")
    parser.add_argument("--seconds", type=float, default=6.0, help="timed per workload, beyond a first call each")
    parser.add_argument(
        "--providers", nargs="+", default=["published", "torch.compile", *backends()], help="only these providers"
    )
    parser.add_argument("--profile", action="store_true", help="print the kernels that take the time, per provider")
    return parser.parse_args(arguments)


def verified(device: torch.device, dtype: torch.dtype, options: argparse.Namespace) -> Errors:
    """Verify kernels and providers, print their errors, and return those of the providers."""
    for (kernel, kind), error in verify_kernels(device, small=options.tiny).items():
        print(f"verified  {kernel:18} {str(kind).removeprefix('torch.'):9} error {error:.1e}", flush=True)
    others = [name for name in options.providers if name not in backends()]
    errors = verify(device, dtype, VERIFIED_TINY if options.tiny else VERIFIED, others)
    for (name, components, kind), error in errors.items():
        print(f"verified  {name:8} {components:8} {str(kind).removeprefix('torch.'):9} error {error:.1e}")
    return errors


def timed(session: Session, dtype: torch.dtype, options: argparse.Namespace, began: float) -> Iterator[list[Row]]:
    """The rows of every workload that is chosen and for which there is time."""
    model, built = None, None
    for work in tiny() if options.tiny else full(options.models):
        if options.only and options.only not in work.name:
            continue
        names = providers_of(work, options.providers)
        first_calls = len(names) * work.flops / session.rate  # none is faster
        if (time.monotonic() - began + first_calls) / 60 > options.minutes:
            print(f"{work.shape.name} {work.name}: left out, the time is over", flush=True)
            continue
        if model is None or built != work.shape:
            model = None  # freed before its successor is made
            model, built = build_model(work.shape, dtype, device=session.device), work.shape
        rows = measure(session, work, model, names, 0.0 if options.tiny else options.seconds)
        if options.profile:
            for name in (n for n in backends() if n in options.providers):
                print(f"-- {work.name}, {name}\n{profiled(provider(name, work, model))}", flush=True)
        yield rows


def line(row: Row) -> str:
    """One row as it is printed."""
    peak = "" if row.peak_bytes is None else f"  peak {row.peak_bytes / 2**30:6.2f} GiB"
    assert row.gflops is not None and row.gemm_fraction is not None
    return (
        f"{row.model:13} {row.workload:28} {row.provider:24} {row.median_s:9.4f} s "
        f"[{row.p20_s:.4f}, {row.p80_s:.4f}]  {row.gflops / 1e3:7.2f} TFLOP/s  "
        f"{row.gemm_fraction:4.0%} of GEMM{peak}"
    )


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    if not options.tiny and not torch.cuda.is_available():
        raise SystemExit(
            "bench.speed.gpu: no GPU here. --tiny runs it with tiny shapes on the CPU; bench.speed.cpu is for CPUs."
        )
    began = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    place = environment(device.type)
    with torch.no_grad():
        errors = verified(device, dtype, options)
        rate, bandwidth = machine(device, dtype, 256 if options.tiny else 8192)
        print(
            f"{place['device']}: GEMM {rate / 1e12:.2f} TFLOP/s in {dtype}, copy {bandwidth / 1e9:.0f} GB/s", flush=True
        )
        machine_rates = {"gemm_tflops": rate / 1e12, "copy_gbytes_per_s": bandwidth / 1e9}
        rows: list[Row] = []
        for new in timed(Session(device, errors, rate, place), dtype, options, began):
            rows += new
            for row in new:
                print(line(row), flush=True)
            if options.out:
                write_results(options.out, "gpu", rows, quick=options.tiny, machine=machine_rates)


if __name__ == "__main__":
    main()
