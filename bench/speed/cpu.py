"""Speed and memory on a CPU against the published algorithm: ``python -m bench.speed.cpu [--out FILE.json] [--quick]``.

Every workload is verified first, then timed interleaved with the published algorithm and with the machine's own GEMM.
Then its memory is measured in a process per provider. The table of ratios is printed beside the goals; rows and ratios
go to the JSON file, from which ``python -m bench.report`` makes RESULTS.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..baselines.providers import PROVIDERS, SinglePrompt, error_against, named_scores, provider
from ..core.cli import command, writable
from ..core.results import Row, environment, write_results
from ..core.timing import Gemm, interleaved, quantiles
from ..memory.provider import peak_bytes

TOLERANCE = 1e-3  # of the largest score, in float32 against float64


@dataclass(frozen=True)
class Goal:
    """The goals of a workload: times faster than published, share of its memory, share of the GEMM rate.

    ``compat`` is times faster than published through the published interface.
    """

    speed: float
    memory: float | None = None
    gemm: float | None = None
    compat: float | None = None


FULL = {
    SinglePrompt("llama-512", "tokens", 48): Goal(3.0),
    SinglePrompt("llama-512", "tokens", 128): Goal(5.0, compat=4.0),
    SinglePrompt("llama-512", "tokens", 256): Goal(6.0, memory=0.5),
    SinglePrompt("llama-512", "neurons", 16): Goal(2.8, gemm=0.8, compat=2.5),
}
QUICK = {
    SinglePrompt("llama-tiny", "tokens", 12): Goal(0.0),
    SinglePrompt("llama-tiny", "neurons", 6): Goal(0.0),
}


def verify(work: SinglePrompt) -> dict[str, tuple[float, str]]:
    """Return the error of every provider and the name of its reference.

    The published neurons start from a residual that does not fit them and override gates at position 0. They are
    verified by the same arithmetic without these two (`corrected`).

    Raises:
        RuntimeError: an error is too large; nothing is timed then.
    """
    model, ids = work.build()
    oracle = named_scores("oracle", work, provider("oracle", work, model, ids)())
    errors = {}
    for name in PROVIDERS:
        checked, note = name, "reference backend, float64"
        if name == "published" and work.components == "neurons":
            checked, note = "published/corrected", note + "; with the published gate overrides and residual left out"
        scores = named_scores(name, work, provider(checked, work, model, ids)())
        against = oracle
        if name == "compat" and work.components == "neurons":  # it reproduces the gate overrides and the residual
            note = "published, float32"
            against = named_scores("published", work, provider("published", work, model, ids)())
        error = error_against(against, scores)
        if not error <= TOLERANCE:
            raise RuntimeError(f"{work.name}: {name} differs from the oracle by {error:.2e}; nothing is timed.")
        errors[name] = (error, note)
    return errors


def measure(work: SinglePrompt, runs: int, memory: bool = True) -> list[Row]:
    """One row per provider, and one for the GEMM."""
    errors = verify(work)
    model, ids = work.build()
    gemm = Gemm(work.shape, work.rows)
    candidates = {name: provider(name, work, model, ids) for name in PROVIDERS}
    seconds = interleaved({**candidates, "gemm": gemm}, runs)
    del candidates
    threads = torch.get_num_threads()
    rate = gemm.rate(seconds["gemm"])
    common = {"workload": work.name, "model": work.model, "dtype": "float32", "environment": environment()}
    rows = []
    for name in PROVIDERS:
        time = quantiles(seconds[name])
        gflops = work.flops / time["median_s"] / 1e9
        rows.append(
            Row(
                provider=name,
                **time,
                **common,
                gflops=gflops,
                gemm_fraction=gflops / rate,
                gemm_gflops=rate,
                peak_bytes=peak_bytes(work, name, threads) if memory else None,
                max_error=errors[name][0],
                compared_with=errors[name][1],
                verified=True,
            )
        )
    label = f"gemm {gemm.rows} x {work.shape.hidden} x {work.shape.intermediate}"
    rows.append(
        Row(
            provider=label,
            **quantiles(seconds["gemm"]),
            **common,
            gflops=rate,
            gemm_fraction=1.0,
            gemm_gflops=rate,
            peak_bytes=None,
            max_error=None,
            compared_with="-",
            verified=True,
        )
    )
    return rows


def ratio(work: SinglePrompt, goal: Goal, rows: list[Row]) -> dict:
    """The library beside the published algorithm, and beside the goal."""
    by_name = {row.provider: row for row in rows}
    ours, theirs, traced = by_name["depass_fast"], by_name["published"], by_name["depass_fast/trace"]
    memory = ours.peak_bytes / theirs.peak_bytes if ours.peak_bytes is not None and theirs.peak_bytes else None
    reached = ours.median_s > 0 and theirs.median_s / ours.median_s >= goal.speed
    reached &= goal.memory is None or (memory is not None and memory <= goal.memory)
    reached &= goal.gemm is None or (ours.gemm_fraction or 0.0) >= goal.gemm
    compat = theirs.median_s / by_name["compat"].median_s
    reached &= goal.compat is None or compat >= goal.compat
    return {
        "workload": work.name,
        "model": work.model,
        "speed": theirs.median_s / ours.median_s,
        "speed_without_capture": theirs.median_s / traced.median_s,
        "speed_goal": goal.speed,
        "memory": memory,
        "memory_goal": goal.memory,
        "gemm_fraction": ours.gemm_fraction,
        "gemm_fraction_without_capture": traced.gemm_fraction,
        "gemm_goal": goal.gemm,
        "compat": compat,
        "compat_goal": goal.compat,
        "reached": bool(reached),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = command("bench.speed.cpu", __doc__)
    parser.add_argument("--out", type=writable, help="write rows and ratios to this JSON file")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, seconds: checks that it runs")
    parser.add_argument("--runs", type=int, help="timed runs per provider (default: 9; 3 with --quick)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help="workloads whose name contains this")
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory measurement")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    runs = options.runs or (3 if options.quick else 9)

    rows: list[Row] = []
    ratios: list[dict] = []
    with torch.inference_mode(False), torch.no_grad():
        for work, goal in (QUICK if options.quick else FULL).items():
            if options.only and options.only not in work.name:
                continue
            measured = measure(work, runs, memory=not options.no_memory)
            rows += measured
            ratios.append(ratio(work, goal, measured))
            print(summary(ratios[-1], measured), flush=True)
            if options.out:  # after every workload: a run that is cut short keeps what it has measured
                write_results(options.out, "cpu", rows, quick=options.quick, ratios=ratios)


def summary(ratio: dict, rows: list[Row]) -> str:
    """One workload in a few lines."""
    memory = "-" if ratio["memory"] is None else f"{ratio['memory']:.2f} of published memory"
    goals = [f"speed ≥ {ratio['speed_goal']:g}×"]
    goals += [f"memory ≤ {ratio['memory_goal']:g}"] if ratio["memory_goal"] is not None else []
    goals += [f"compat ≥ {ratio['compat_goal']:g}×"] if ratio["compat_goal"] is not None else []
    goals += [f"GEMM ≥ {ratio['gemm_goal']:.0%}"] if ratio["gemm_goal"] is not None else []
    lines = [
        f"{ratio['model']}  {ratio['workload']}: {ratio['speed']:.2f}× faster ({ratio['speed_without_capture']:.2f}× "
        f"without capture), {memory}, {ratio['gemm_fraction']:.0%} of the GEMM rate "
        f"({ratio['gemm_fraction_without_capture']:.0%} without capture), compat {ratio['compat']:.2f}×   "
        f"goal: {', '.join(goals)}   {'reached' if ratio['reached'] else 'MISSED'}"
    ]
    for row in rows:
        peak = "" if row.peak_bytes is None else f"  peak {row.peak_bytes / 2**20:8.1f} MiB"
        error = "" if row.max_error is None else f"  error {row.max_error:.1e}"
        lines.append(
            f"    {row.provider:24s} {row.median_s * 1e3:9.1f} ms [{row.p20_s * 1e3:.1f}, {row.p80_s * 1e3:.1f}]"
            f"  {row.gflops:7.1f} GFLOP/s{peak}{error}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
