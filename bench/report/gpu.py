"""The sections that `python -m bench.speed.gpu` fills, and the table of its goals for the kernels' README."""

from __future__ import annotations

from pathlib import Path

from ..core.markdown import duration, heading, percent, table
from ..core.results import ROOT
from ..speed.gpu.predictions import GOALS, Goal
from . import speeds

README = ROOT / "depass_fast" / "kernels" / "README.md"
BEGIN, END = "<!-- goals: made by python -m bench.report --goals; do not edit -->", "<!-- end of goals -->"


def section(result: dict) -> str:
    """Rows as of any speed benchmark, then what else the run found; older files hold rows only."""
    parts = [speeds.section(result)] if result["rows"] else [heading("gpu", result["environment"])]
    for name, make in (("gemms", _gemms), ("kernels", _kernels), ("variants", _variants), ("timelines", _timelines)):
        if result.get(name):
            parts += make(result[name])
    if result.get("kernel_checks"):
        parts.append(_checks(result["kernel_checks"]))
    if result.get("failures"):
        parts.append("**Failed**: " + ", ".join(failure["part"] for failure in result["failures"]) + ".")
    if result.get("left_out"):
        parts.append("Left out, since the time was over: " + "; ".join(result["left_out"]) + ".")
    return "\n\n".join(parts)


def _gemms(found: list[dict]) -> list[str]:
    lines = [
        [g["model"], g["product"], g["dtype"], f"{g['m']:,} x {g['k']:,} x {g['n']:,}", f"{g['tflops']:.0f}"]
        for g in found
    ]
    text = "The products of a layer as the backends call them: the rate that a row's share of GEMM is of."
    return [text, table(["model", "product", "dtype", "M x K x N", "TFLOP/s"], lines)]


def _kernels(found: list[dict]) -> list[str]:
    header = ["kernel", "case", "dtype", "median", "[p20, p80]", "GB/s", "of the copy's", "TFLOP/s"]
    lines = [
        [
            row["kernel"],
            row["case"],
            row["dtype"],
            duration(row["median_s"]),
            f"[{duration(row['p20_s'])}, {duration(row['p80_s'])}]",
            f"{row['gbytes_per_s']:,.0f}",
            percent(row["of_copy"]),
            f"{row['tflops']:.0f}" if row["flops"] else "-",
        ]
        for row in found
    ]
    return ["Every kernel at production widths beside the least bytes that it must move.", table(header, lines)]


def _checks(found: list[dict]) -> str:
    worst = {dtype: max(r["error"] for r in found if r["dtype"] == dtype) for dtype in {r["dtype"] for r in found}}
    errors = ", ".join(f"{error:.1e} in {dtype}" for dtype, error in sorted(worst.items()))
    wrong = [f"{r['kernel']}, {r['case']}, {r['dtype']}" for r in found if not r["right"]]
    said = f"**wrong**: {'; '.join(wrong)}" if wrong else "all right, and three runs bitwise equal"
    return f"{len(found)} kernels at production widths against float64 (‖difference‖ / ‖oracle‖ {errors}): {said}."


def _variants(found: list[dict]) -> list[str]:
    header = ["comparison", "variant", "median", "[p20, p80]", "first call", "of GEMM"]
    lines = []
    for row in found:
        if "left_out" in row:
            lines.append([row["comparison"], row["variant"], row["left_out"], "-", "-", "-"])
            continue
        spread = f"[{duration(row['p20_s'])}, {duration(row['p80_s'])}]"
        cells = [duration(row["median_s"]), spread, duration(row["first_call_s"]), f"{row['gemm_fraction']:.1%}"]
        lines.append([row["comparison"], row["variant"], *cells])
    return ["Variants in turns, in the first eight layers.", table(header, lines, left=2)]


def _timelines(found: dict[str, dict]) -> list[str]:
    header = ["workload", "total", "busy", "waiting for the host", "operations", "most of the time"]
    lines = [
        [
            name,
            f"{t['total_ms']:.1f} ms",
            f"{t['busy_ms']:.1f} ms",
            f"{t['host_bound_ms']:.1f} ms ({t['host_bound_share']:.0%})",
            f"{t['operations']:,}",
            "; ".join(f"{row['ms']:.1f} ms {row['name'][:40].replace('|', ' ')}" for row in t["top"][:3]) or "-",
        ]
        for name, t in found.items()
    ]
    return ["The device in one profiled call of each.", table(header, lines, left=1)]


def goals_table(results: list[dict]) -> str:
    """Goals, predictions and what was reached, a line per goal and card."""
    header = ["workload", "shape", "goal", "predicted", "card", "reached", "of GEMM", "goal reached", "why"]
    rows = [row for result in results if result.get("benchmark") == "gpu" for row in result["rows"]]
    lines = []
    for goal in GOALS:
        fitting = [r for r in rows if (r["workload"], r["model"]) == (goal.workload, goal.model)]
        fitting = [r for r in fitting if r["provider"] == "triton"]
        for device in sorted({r["environment"]["device"] for r in fitting}):
            lines.append(_goal_line(goal, device, _telling(fitting, device)))
    return table(header, lines, left=9)


def _telling(rows: list[dict], device: str) -> dict:
    """The row of a card that tells most: no first call, of the newest day, of most runs, the fastest."""
    here = [row for row in rows if row["environment"]["device"] == device]
    keys = [(not r["first_call"], r["environment"]["date"], r["runs"], -r["median_s"]) for r in here]
    return here[keys.index(max(keys))]


def _goal_line(goal: Goal, device: str, row: dict) -> list[str]:
    calls = "first call" if row["first_call"] else f"{row['runs']} run{'s' if row['runs'] > 1 else ''}"
    reached = goal.reached(device, row["median_s"], row["gemm_fraction"])
    said = {True: "yes", False: "**no**", None: "-"}[reached]
    found = [f"{row['median_s']:.3g} s ({calls})", f"{row['gemm_fraction']:.0%}", said]
    return [goal.workload, goal.model, goal.text(), goal.predicted, device, *found, "-" if reached else goal.why]


def between_marks(page: str, results: list[dict]) -> str:
    """The page with the table of goals made anew."""
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n\n{goals_table(results)}\n\n{END}{rest.split(END)[1]}"


def write_goals(results: list[dict], path: Path = README) -> None:
    """Make the table of goals in the kernels' README anew."""
    path.write_text(between_marks(path.read_text(), results))
