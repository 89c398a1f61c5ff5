"""bench/RESULTS.md out of result files: ``python -m bench.report bench/results/*.json``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

RESULTS = Path(__file__).parent / "RESULTS.md"
HEAD = """# Results

Made by `python -m bench.report bench/results/*.json`; do not edit. Times are medians with [p20, p80] of interleaved
runs. GFLOP/s are useful ones: the floor of the workload (see `harness.py`) over the time, whoever does the work. The
GEMM row is the machine's own rate for the two MLP products in the same interleaved run. Errors are relative to the
largest score. "Without capture": the library's forward pass was taken beforehand, the published one's was not.
"Compat": the same calls through `depass_fast.compat`, which returns the whole final state, as the published code does.
"""


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, the first columns left-aligned."""
    rule = ["---" if i < 3 else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])


def report(results: list[dict]) -> str:
    """The whole page."""
    return "\n\n".join([HEAD.rstrip(), *(section(result) for result in results)]) + "\n"


def section(result: dict) -> str:
    """One result file: where it was measured, the ratios if it has any, the rows, what they were compared with."""
    env = result["environment"]
    place = ", ".join(f"{key} {env[key]}" for key in env if key not in ("device", "threads", "date"))
    threads = f", {env['threads']} threads" if "threads" in env else ""
    if result["benchmark"] == "adjoint":
        return adjoint_section(result)
    parts = [f"## {result['benchmark']}: {env['device']}{threads} ({env['date']})", place + "."]
    if result.get("ratios"):
        header = ["workload", "model", "speed", "goal", "without capture", "compat", "goal"]
        header += ["memory", "goal", "GEMM", "goal", "reached"]
        parts.append(table(header, [_ratio(r) for r in result["ratios"]]))
    header = ["workload", "provider", "model", "dtype", "median", "[p20, p80]", "GFLOP/s", "of GEMM", "peak", "error"]
    parts.append(table(header, [_row(r) for r in result["rows"]]))
    notes: dict[str, list[str]] = {}
    for row in result["rows"]:
        if row["compared_with"] != "-":
            notes.setdefault(row["compared_with"], []).append(f"{row['provider']} ({row['workload']})")
    lines = [f"- {what}: {'; '.join(who)}." for what, who in notes.items()]
    parts.append("Errors are against:\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def adjoint_section(result: dict) -> str:
    """`bench.adjoint`: agreement at every start layer, speed, what each part buys, faithfulness."""
    env, goals = result["environment"], result["goals"]
    place = ", ".join(f"{key} {env[key]}" for key in env if key not in ("device", "date"))
    head = f"## adjoint: {env['device']} ({env['date']})\n\n{place}."
    goal = f"≥ {goals['spearman']}, ≥ {goals['pearson']}, found ≥ {goals['found']:.0%}"
    text = (
        "Against exact propagation, means over prompts (least of any in brackets). Goals after refining 2 % of a "
        f"layer: {goal} of the true top 1 % among the refined."
    )
    header = ["model", "layer", "prompts", "Spearman screened", "Pearson screened", "Spearman refined"]
    header += ["Pearson refined", "found", "relative error", "completeness", "reached"]
    rows = []
    for row in result["agreement"]:
        cells = [row["model"], str(row["layer"]), str(row["prompts"])]
        for stage in ("screened", "refined"):
            values = row[stage]
            cells += [f"{values[name]:.4f} ({values['least_' + name]:.4f})" for name in ("spearman", "pearson")]
        last = row["refined"]
        cells += [f"{last['found']:.1%}", f"{last['relative_error']:.1%}", f"{row['completeness']['refined']:.0e}"]
        rows.append([*cells, "yes" if row["reached"] else "**no**"])
    parts = [head, text, table(header, rows)]
    header = ["workload", "scale", "exact", "screened", "refined 2 %", "goal (screened)", "reached"]
    rows = [
        [row["workload"], str(row["scale"]), f"{row['seconds']['exact'] * 1e3:.0f} ms"]
        + [f"{row['ratios'][key]:.1f}×" for key in ("screened", "refined")]
        + [f"≥ {row['goal']:g}×", "yes" if row["reached"] else "**no**"]
        for row in result["speed"]
    ]
    parts += ["Times faster than exact propagation, from a trace, in turns (D = 256, I = 704, 6 layers, N = 16).",
              table(header, rows)]  # fmt: skip
    header = ["variant", "model", "Spearman", "Pearson", "found", "relative error", "FLOP of exact"]
    rows = [
        [row["variant"], row["model"]]
        + [f"{row[name]:.4f}" for name in ("spearman", "pearson")]
        + [f"{row['found']:.1%}", f"{row['relative_error']:.1%}", f"{row['flop_share']:.1%}"]
        for row in result["parts"]
    ]
    parts += ["What every part buys: the worst start layer's mean.", table(header, rows)]
    curves = result["faithfulness"]
    header = ["ranked by", *(f"{share:.2%}" for share in curves["shares"])]
    rows = [[name, *(f"{value:.2f}" for value in values)] for name, values in curves["accuracy"].items()]
    text = f"Accuracy on {curves['prompts']} held-out prompts of the demo model with that share of all neurons masked."
    return "\n\n".join([*parts, text, table(header, rows)])


def _ratio(r: dict) -> list[str]:
    return [
        r["workload"],
        r["model"],
        f"{r['speed']:.2f}×",
        f"≥ {r['speed_goal']:g}×",
        f"{r['speed_without_capture']:.2f}×",
        "-" if r.get("compat") is None else f"{r['compat']:.2f}×",
        "-" if r.get("compat_goal") is None else f"≥ {r['compat_goal']:g}×",
        _percent(r["memory"]),
        "-" if r["memory_goal"] is None else f"≤ {r['memory_goal']:.0%}",
        _percent(r["gemm_fraction"]),
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
        f"{r['median_s'] * 1e3:.1f} ms",
        f"[{r['p20_s'] * 1e3:.1f}, {r['p80_s'] * 1e3:.1f}]",
        "-" if rate is None else f"{rate:.1f}",
        _percent(r["gemm_fraction"]),
        "-" if peak is None else f"{peak / 2**20:.1f} MiB",
        "-" if error is None else f"{error:.0e}",
    ]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="JSON files that benchmarks wrote")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    options.out.write_text(report([json.loads(path.read_text()) for path in options.results]))


if __name__ == "__main__":
    main()
