"""Kernels at production widths: right to rounding, the same three times, and as fast as their bytes can be moved."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

import torch
from torch import Tensor

from ...core.results import ROOT
from ...core.timing import quantiles
from .cases import SANITIZED, TINY, KernelCase, Prepared, Sizes, kernel_cases
from .events import seconds_of
from .session import Session

# ‖out - oracle‖ / ‖oracle‖, by the dtype of what is written: what its rounding takes, and that of P in `mix`
LIMITS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}
DTYPES = (torch.bfloat16, torch.float16)
RUNS = 3
SANITIZER = "compute-sanitizer"


def sizes_of(session: Session) -> Sizes:
    return TINY if session.tiny else Sizes()


def dtypes_of(device: torch.device) -> tuple[torch.dtype, ...]:
    """Both half precisions; float16 and float32 in the interpreter, whose bfloat16 products are wrong."""
    return DTYPES if device.type == "cuda" else (torch.float16, torch.float32)


def compile_kernels(session: Session, workers: int = 12) -> None:
    """Compile the kernels of all cases in several processes, so that this one finds them in Triton's cache."""
    cases = len(kernel_cases(sizes_of(session)))
    places = [(i, dtype) for i in range(cases) for dtype in DTYPES]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        said = [text for text in pool.map(_compile, places) if text]
    session.say(f"{len(places)} cases compiled by {workers} processes")
    if said:
        raise RuntimeError("\n".join(said))


def _compile(place: tuple[int, torch.dtype]) -> str | None:
    """Run one case once, in a process of its own. Return the error, if any."""
    case = kernel_cases(Sizes())[place[0]]
    try:
        with torch.no_grad():
            made = case.make(place[1], torch.device("cuda"))
            made.run(made.start())
            torch.cuda.synchronize()
    except Exception as error:
        return f"{case.kernel}, {case.name}, {place[1]}: {type(error).__name__}: {error}"
    return None


def check_kernels(session: Session) -> None:
    """Hold every case against float64, three times, into poisoned outputs.

    Raises:
        RuntimeError: a kernel is off, or its runs differ; names all of them.
    """
    wrong, rows = [], session.sections.setdefault("kernel_checks", [])
    for dtype in dtypes_of(session.device):
        for case in kernel_cases(sizes_of(session)):
            row = checked(case, dtype, session.device)
            rows.append(row)
            good = "right" if row["right"] else "WRONG"
            session.say(
                f"{good} {case.kernel:12} {case.name:36} {row['dtype']:8} error {row['error']:.1e}, "
                f"{RUNS} runs {'equal' if row['equal'] else 'DIFFER'}"
            )
            if not row["right"]:
                wrong.append(f"{case.kernel}, {case.name}, {row['dtype']}: error {row['error']:.1e}")
    if wrong:
        raise RuntimeError("kernels differ from float64 or from themselves: " + "; ".join(wrong))


def checked(case: KernelCase, dtype: torch.dtype, device: torch.device) -> dict:
    """One case's relative norm error, and whether ``RUNS`` runs are bitwise the same."""
    made = case.make(dtype, device)
    first, equal = _once(made), True
    for _ in range(RUNS - 1):
        equal &= torch.equal(_bits(_once(made)), _bits(first))
    error = norm_error(first, made.oracle())
    return {
        "kernel": case.kernel,
        "case": case.name,
        "dtype": str(dtype).removeprefix("torch."),
        "error": error,
        "equal": equal,
        "right": equal and error <= LIMITS[first.dtype],
    }


def _once(made: Prepared) -> Tensor:
    # where a new output is returned, the allocator may give it the memory of the poisoned one
    return made.run(made.start())


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16 if x.itemsize == 2 else torch.int32)


def norm_error(out: Tensor, oracle: Tensor) -> float:
    """‖out - oracle‖ / ‖oracle‖; NaN counts as inf."""
    worst = (out.double() - oracle).norm() / oracle.norm().clamp_min(1e-300)
    return float(torch.nan_to_num(worst, nan=float("inf")))


def time_kernels(session: Session) -> None:
    """Time every case by the device's clock, beside the least time that its bytes and its operations take."""
    copy = session.sections.get("machine", {}).get("copy_gbytes_per_s")
    rows = session.sections.setdefault("kernels", [])
    for dtype in dtypes_of(session.device):
        for case in kernel_cases(sizes_of(session)):
            made = case.make(dtype, session.device)
            out = made.start()
            values = seconds_of(lambda run=made.run, out=out: run(out), session.device, runs=2 if session.tiny else 15)
            time_of = quantiles(values)
            gbytes = made.moved / time_of["median_s"] / 1e9
            row = {
                "kernel": case.kernel,
                "case": case.name,
                "dtype": str(dtype).removeprefix("torch."),
                **time_of,
                "bytes": made.moved,
                "flops": made.flops,
                "gbytes_per_s": gbytes,
                "of_copy": None if copy is None else gbytes / copy,
                "tflops": made.flops / time_of["median_s"] / 1e12,
            }
            rows.append(row)
            share = "" if copy is None else f", {row['of_copy']:.0%} of the copy's"
            products = f", {row['tflops']:.1f} TFLOP/s" if made.flops else ""
            session.say(
                f"{case.kernel:12} {case.name:36} {row['dtype']:8} {time_of['median_s'] * 1e3:8.3f} ms "
                f"{gbytes:6.0f} GB/s{share}{products}"
            )


def sanitize(session: Session, limit: float) -> None:
    """Run all cases at small sizes under compute-sanitizer's memcheck, for at most ``limit`` seconds.

    Raises:
        RuntimeError: the sanitizer is not there, found an error, or took too long.
    """
    if shutil.which(SANITIZER) is None:
        raise RuntimeError(f"{SANITIZER} is not on the PATH.")
    command = [SANITIZER, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", __name__]
    # every tensor has an allocation of its own, so that reading beside it is seen
    place = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, cwd=ROOT, env=place, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired as error:
        said = error.stdout or b""
        text = said.decode() if isinstance(said, bytes) else said
        raise RuntimeError(f"{SANITIZER} took longer than {limit:.0f} s, after:\n{text[-1500:]}") from None
    session.sections["sanitizer"] = {"returned": done.returncode, "said": (done.stdout + done.stderr)[-3000:]}
    session.say(f"{SANITIZER}: {done.stdout.strip().splitlines()[-1:] or done.returncode}")
    if done.returncode:
        raise RuntimeError(f"{SANITIZER} returned {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")


@torch.no_grad()
def main() -> None:
    """Run every case once at small sizes, for the sanitizer."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for dtype in dtypes_of(device):
        for case in kernel_cases(SANITIZED if device.type == "cuda" else TINY):
            print(case.kernel, case.name, dtype, checked(case, dtype, device)["error"], flush=True)


if __name__ == "__main__":
    main()
