"""The sections of `bench.speed.cpu` and `bench.speed.gpu`: ratios beside goals, then every row."""

from __future__ import annotations

from ..core.markdown import heading, percent, table


def section(result: dict) -> str:
    """The place of the measurement, ratios (if there are any), rows, and their references."""
    parts = [heading(result["benchmark"], result["environment"])]
    if result.get("ratios"):
        header = ["workload", "model", "speed", "goal", "without capture", "compat", "goal"]
        header += ["memory", "goal", "GEMM", "goal", "reached"]
        parts.append(table(header, [_ratio(r) for r in result["ratios"]]))
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
