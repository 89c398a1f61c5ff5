"""Speed and correctness on a GPU: ``python -m bench.speed.gpu --out FILE.json --minutes 6``, ``--tiny`` anywhere.

Parts run in this order, each named so that ``--only`` can choose it: clocks, rates of the machine, kernels at
production widths (right, then against their bytes), the backends on small models, the workloads on random models of
real shapes that are built on the device, variants of the library in turns, a long prompt, rivals, and every corner of
every kernel. The file is written after every figure. A part that fails prints its traceback, and the rest goes on; the
command ends with an error then. ``--tiny`` runs all of it with tiny shapes, on a CPU too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ...core.cli import command, writable
from ...core.models import SHAPES
from ...kernels.checks import verify as verify_corners
from . import kernels, workloads
from .machine import clocks, copy_rate, float32_rates, square_rate
from .measurement import measure, providers_of
from .session import Session
from .variants import compare, comparisons
from .verification import verify_backends, verify_forward, verify_others, verify_precision
from .workloads import Work, backends


@dataclass(frozen=True)
class Part:
    """One part of the run, and the seconds that it takes at least: it is not begun where they are not left."""

    name: str
    run: Callable[[], object]
    least_s: float = 1.0


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = command("bench.speed.gpu", __doc__)
    parser.add_argument("--out", type=writable, help="write the rows to this JSON file, after every figure")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on a CPU too: checks that it runs")
    parser.add_argument(
        "--models", nargs="+", default=["llama-2-7b", "qwen2-7b", "llama-3.1-8b"], choices=tuple(SHAPES)
    )
    parser.add_argument("--only", nargs="+", default=[], help="parts whose name contains one of these")
    parser.add_argument("--not", nargs="+", default=[], dest="without", help="parts that are left out, likewise")
    parser.add_argument("--minutes", type=float, default=6.0, help="no part is begun that takes longer than this")
    parser.add_argument("--seconds", type=float, default=10.0, help="timed per workload, beyond its first calls")
    parser.add_argument(
        "--providers", nargs="+", default=["published", "torch.compile", *backends()], help="only these providers"
    )
    parser.add_argument("--sanitize", type=float, metavar="SECONDS", help="kernels under compute-sanitizer, so long")
    return parser.parse_args(arguments)


def look(session: Session) -> None:
    """The clocks as they are now."""
    found = clocks()
    session.sections.setdefault("clocks", []).append({"at_s": session.elapsed, **found})
    session.say(f"clocks: {found or 'no nvidia-smi here'}")


def rates(session: Session, shape_name: str) -> None:
    """The rates of copies, of a large square product, and of a layer's products."""
    device, tiny = session.device, session.tiny
    copied = copy_rate(device, 1 << 20 if tiny else 1 << 31)
    machine = {"copy_gbytes_per_s": copied / 1e9}
    for dtype in (torch.float32,) if device.type == "cpu" else (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        machine[f"square_tflops_{name}"] = square_rate(device, dtype, 256 if tiny else 8192) / 1e12
    session.sections["machine"] = machine
    session.rate = 1e12 * max(rate for name, rate in machine.items() if name.startswith("square"))
    session.say(", ".join(f"{name} {value:.1f}" for name, value in machine.items()))
    session.rates(SHAPES[shape_name])


def float32(session: Session) -> None:
    """Products of float32 matrices, by cuBLAS and as three in float16."""
    sizes = (33, 64, 96) if session.tiny else (11009, 4096, 11008)
    session.sections["float32"] = found = float32_rates(session.device, *sizes)
    session.say(f"float32 products: {', '.join(f'{name} {value:.3g}' for name, value in found.items())}")


def corners(session: Session) -> None:
    """Every corner of every kernel at small sizes."""
    found = verify_corners(session.device, small=session.tiny)
    session.sections["corners"] = {
        f"{name} {str(dtype).removeprefix('torch.')}": e for (name, dtype), e in found.items()
    }
    session.say(f"corners: {session.sections['corners']}")


def parts(session: Session, options: argparse.Namespace) -> Iterator[Part]:
    """All parts, in order."""
    first = "llama-tiny" if session.tiny else options.models[0]
    yield Part("clocks", lambda: look(session))
    yield Part("rates", lambda: rates(session, first))
    yield Part("float32 products", lambda: float32(session))
    if backends()[0] == "triton":
        yield from kernel_parts(session, options.sanitize)
    yield Part("verify backends", lambda: verify_backends(session), 10.0)
    yield Part("verify forward", lambda: verify_forward(session), 5.0)
    yield Part("verify precision", lambda: verify_precision(session), 10.0)
    for work in workloads.tiny() if session.tiny else workloads.full(options.models):
        yield of(session, work, options.providers)
    yield Part("clocks after work", lambda: look(session))
    for comparison in comparisons(first, session.tiny):
        least = 3 * len(comparison.setups) * comparison.work.flops / session.rate
        yield Part(f"variants, {comparison.name}", lambda c=comparison: compare(session, c), least)
    if not session.tiny:
        for work in [*workloads.others(options.models), *workloads.long(options.models)]:
            yield of(session, work, options.providers)
    yield from rival_parts(session, options)


def kernel_parts(session: Session, limit: float | None) -> Iterator[Part]:
    """The kernels at production widths; for ``limit`` seconds under the sanitizer."""
    if session.device.type == "cuda":
        yield Part("kernels: compile", lambda: kernels.compile_kernels(session))
    yield Part("kernels: right", lambda: kernels.check_kernels(session))
    if limit:
        yield Part("kernels: sanitize", lambda: kernels.sanitize(session, limit), limit)
    yield Part("kernels: bytes", lambda: kernels.time_kernels(session))


def rival_parts(session: Session, options: argparse.Namespace) -> Iterator[Part]:
    """The rivals, and last the kernels' corners, which the tests have seen interpreted."""
    others = [name for name in options.providers if name not in backends()]
    if others:
        yield Part("verify rivals", lambda: verify_others(session, others), 10.0)
    for work in workloads.tiny_rivals() if session.tiny else workloads.rivals(options.models):
        yield of(session, work, options.providers, "rivals, ")
    if session.device.type == "cuda":
        yield Part("corners", lambda: corners(session), 60.0)


def of(session: Session, work: Work, providers: list[str], kind: str = "") -> Part:
    """The part that measures a workload, named by its shape and its name."""
    names = providers_of(work, providers)
    least = len(names) * work.flops / session.rate * min(work.runs + 1, 3)
    return Part(f"{kind}{work.shape.name} {work.name}", lambda: measure(session, work, names), least)


def chosen(part: Part, options: argparse.Namespace) -> bool:
    """True if --only and --not leave the part in."""
    wanted = not options.only or any(text in part.name for text in options.only)
    return wanted and not any(text in part.name for text in options.without)


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    if not options.tiny and not torch.cuda.is_available():
        raise SystemExit(
            "bench.speed.gpu: no GPU here. --tiny runs it with tiny shapes on the CPU; bench.speed.cpu is for CPUs."
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    session = Session(device, options.tiny, 0.2 if options.tiny else options.seconds, options.out)
    session.say(f"{session.place['device']}, torch {session.place['torch']}, triton {session.place['triton']}")
    began: list[str] = []
    with torch.no_grad():
        for part in parts(session, options):
            if not chosen(part, options):
                continue
            if session.elapsed + part.least_s > 60 * options.minutes:
                session.say(f"{part.name}: left out, the time is over")
                session.sections.setdefault("left_out", []).append(part.name)
                continue
            session.say(f"-- {part.name}")
            session.attempt(part.name, part.run)
            began.append(part.name)
    session.say(f"{len(began)} parts, {len(session.failures)} failed")
    if not began:
        raise SystemExit(f"bench.speed.gpu: no part is called {' or '.join(options.only)}, or no time is left.")
    if session.failures:
        raise SystemExit(f"bench.speed.gpu: failed: {', '.join(failure['part'] for failure in session.failures)}.")


if __name__ == "__main__":
    main()
