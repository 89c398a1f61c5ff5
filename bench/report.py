"""bench/RESULTS.md out of result files: ``python -m bench.report bench/results/*.json``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from . import adjoint_table, tables
from .ablation import table as ablation_table
from .markdown import duration, heading, percent, table

RESULTS = Path(__file__).parent / "RESULTS.md"
HEAD = """# Results

Made by `python -m bench.report bench/results/*.json`; do not edit. Times are medians with [p20, p80] of interleaved
runs, as many as a row says; a first call is in none of them, unless the row says so. GFLOP/s are useful ones: the floor
of the workload (see `harness.py`) over the time, whoever does the work. The machine's own GEMM rate is measured in the
same run: where there is a GEMM row, that of the two MLP products, interleaved with the others; on a GPU that of a large
square product, beforehand. Errors are relative to the largest score. "Without capture": the library's forward pass was
taken beforehand, the published one's was not. "Compat": the same calls through `depass_fast.compat`, which returns the
whole final state, as the published code does.
"""


def report(results: list[dict]) -> str:
    """The whole page."""
    return "\n\n".join([HEAD.rstrip(), *(section(result) for result in results)]) + "\n"


def section(result: dict) -> str:
    """One result file."""
    kind = "suite" if "benchmarks" in result else result["benchmark"]  # pytest-benchmark writes its own format
    return SECTIONS.get(kind, speeds)(result)


def speeds(result: dict) -> str:
    """Where it was measured, the ratios if it has any, the rows, what they were compared with."""
    parts = [heading(result["benchmark"], result["environment"])]
    if result.get("ratios"):
        header = ["workload", "model", "speed", "goal", "without capture", "compat", "goal"]
        header += ["memory", "goal", "GEMM", "goal", "reached"]
        parts.append(table(header, [_ratio(r) for r in result["ratios"]]))
    if result.get("predictions"):
        return "\n\n".join([*parts, *predictions(result)])
    header = ["workload", "provider", "model", "dtype", "median", "[p20, p80]", "runs", "GFLOP/s", "of GEMM", "peak"]
    header.append("error")
    parts.append(table(header, [_row(r) for r in result["rows"]]))
    notes: dict[str, list[str]] = {}
    for row in result["rows"]:
        if row["compared_with"] != "-":
            notes.setdefault(row["compared_with"], []).append(f"{row['provider']} ({row['workload']})")
    lines = [f"- {what}: {'; '.join(who)}." for what, who in notes.items()]
    parts.append("Errors are against:\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def predictions(result: dict) -> list[str]:
    """The peaks of memory that the planner predicts beside the measured ones, and the furthest off."""
    header = [
        "case",
        "model",
        "components",
        "tokens",
        "D",
        "I",
        "layers",
        "dtype",
        "state",
        "predicted",
        "measured",
        "off",
    ]
    rows, worst = [], 0.0
    for r in result["predictions"]:
        off = r["predicted_bytes"] / r["measured_bytes"] - 1
        worst = max(worst, abs(off))
        tokens = str(r["lengths"][0]) if len(r["lengths"]) == 1 else f"{len(r['lengths'])} prompts"
        shape = [str(r[name]) for name in ("hidden", "intermediate", "layers")]
        sizes = [f"{r[name] / 2**20:.0f} MiB" for name in ("predicted_bytes", "measured_bytes")]
        cells = [r["name"], r["model_type"], f"{r['components']}, {r['call']}", tokens, *shape]
        rows.append([*cells, r["dtype"], r["state_dtype"], *sizes, f"{off:+.1%}"])
    reached = "reached" if worst <= result["goal"] else "**missed**"
    text = f"Peak of memory beyond the loaded model. Furthest off: {worst:.1%}; goal {result['goal']:.0%}, {reached}."
    sweeps = [r for r in result["predictions"] if r.get("method") == "adjoint"]
    return [table(header, rows), text, *(_sweeps(sweeps) if sweeps else [])]


def _sweeps(rows: list[dict]) -> list[str]:
    """What else is known of adjoint sweeps: their loud components, the resident set, the time."""
    header = [
        "case",
        "layers",
        "refined",
        "sampled",
        "loud",
        "workspace",
        "resident",
        "of allocated",
        "time predicted",
        "time",
    ]
    cells = []
    for r in rows:
        layers = "all" if r["every"] else str(r["layer"])
        budget = "-" if r["memory_budget"] is None else f"{r['memory_budget'] / 2**20:.0f} MiB"
        resident = [f"{r['resident_bytes'] / 2**20:.0f} MiB", f"{r['resident_bytes'] / r['measured_bytes']:.2f}×"]
        times = [duration(r["predicted_seconds"]), duration(r["seconds"])]
        cells.append([r["name"], layers, str(r["refine"]), str(r["sample"]), str(r["loud"]), budget, *resident, *times])
    text = (
        "Adjoint sweeps: above is what they allocate, with every freed block given back (`MALLOC_MMAP_THRESHOLD_`); "
        "here is what is resident without that. Loud components were counted; no config tells how many there are."
    )
    return [text, table(header, cells)]


def _ratio(r: dict) -> list[str]:
    return [
        r["workload"],
        r["model"],
        f"{r['speed']:.2f}×",
        f"≥ {r['speed_goal']:g}×",
        f"{r['speed_without_capture']:.2f}×",
        "-" if r.get("compat") is None else f"{r['compat']:.2f}×",
        "-" if r.get("compat_goal") is None else f"≥ {r['compat_goal']:g}×",
        percent(r["memory"]),
        "-" if r["memory_goal"] is None else f"≤ {r['memory_goal']:.0%}",
        percent(r["gemm_fraction"]),
        "-" if r["gemm_goal"] is None else f"≥ {r['gemm_goal']:.0%}",
        "yes" if r["reached"] else "**no**",
    ]


def _row(r: dict) -> list[str]:
    peak, error, rate = r["peak_bytes"], r["max_error"], r["gflops"]
    return [
        r["workload"],
        r["provider"],
        r["model"],
        r["dtype"],
        f"{r['median_s'] * 1e3:.1f} ms" + (" (first call)" if r.get("first_call") else ""),
        f"[{r['p20_s'] * 1e3:.1f}, {r['p80_s'] * 1e3:.1f}]",
        str(r["runs"]),
        "-" if rate is None else f"{rate:.1f}",
        percent(r["gemm_fraction"]),
        "-" if peak is None else f"{peak / 2**20:.1f} MiB",
        "-" if error is None else f"{error:.0e}",
    ]


SECTIONS = {
    "adjoint": adjoint_table.section,
    "ablation": ablation_table.section,
    "grouping": tables.grouping,
    "layers": tables.layers,
    "meta": tables.meta,
    "prompts": tables.prompts,
    "suite": tables.suite,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files that benchmarks wrote")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    options.out.write_text(report([json.loads(path.read_text()) for path in options.results]))


if __name__ == "__main__":
    main()
