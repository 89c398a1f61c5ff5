"""The sections of the room `memory`: the planner's predictions beside measured and counted peaks."""

from __future__ import annotations

from ..core.markdown import duration, heading, table

META = """Whole runs in the shapes of real models, in their first layers (all of them for "all layers"), made on torch's
meta device (`python -m bench.memory.meta`). The table holds the bytes of all live storages at the peak, without the
weights, beside the planner's prediction; the part of them that is neither state nor trace ("beside"); and the number of
operations that a GPU would be given. Models are in bfloat16 and states in float32, unless said otherwise.
Furthest off: {worst:.1%}; goal {goal:.0%}, {reached}."""


def planned(result: dict) -> str:
    """`bench.memory.plan`: predicted and measured peaks, and the largest difference."""
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
    others = [r for r in result["predictions"] if r.get("method") != "adjoint" and "resident_bytes" in r]
    parts = [heading("plan", result["environment"]), table(header, rows), text]
    return "\n\n".join([*parts, *(_sweeps(sweeps) if sweeps else []), *(_others(others) if others else [])])


def _sweeps(rows: list[dict]) -> list[str]:
    """The other figures of adjoint sweeps: their loud components, the resident set, the time."""
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


def _others(rows: list[dict]) -> list[str]:
    """The resident set and the time of other rows whose blocks were given back."""
    cells = []
    for r in rows:
        resident = [f"{r['resident_bytes'] / 2**20:.0f} MiB", f"{r['resident_bytes'] / r['measured_bytes']:.2f}×"]
        times = [duration(r[name]) if name in r else "-" for name in ("predicted_seconds", "seconds")]
        cells.append([r["name"], *resident, *times])
    text = (
        "Ways back: above is what they allocate, with every freed block given back; here is "
        "what is resident without that. Predicted times leave recurrences out."
    )
    return [text, table(["case", "resident", "of allocated", "time predicted", "time"], cells)]


def counted(result: dict) -> str:
    """`bench.memory.meta`: predicted and counted peaks, and the number of operations."""
    header = ["workload", "model", "backend", "layers", "predicted", "counted", "off", "beside", "operations"]
    lines, worst = [], 0.0
    for row in result["predictions"]:
        predicted, counted = row["predicted_bytes"], row["measured_bytes"]
        worst, beside = max(worst, abs(predicted / counted - 1)), counted - row["state_bytes"] - row["trace_bytes"]
        sizes = [f"{size / 2**30:.2f} GiB" for size in (predicted, counted)]
        cells = [f"{predicted / counted - 1:+.1%}", f"{beside / 2**30:.2f} GiB", f"{row['operations']:,}"]
        lines.append([row["name"], row["model"], row["backend"], str(row["layers"]), *sizes, *cells])
    reached = "reached" if worst <= result["goal"] else "**missed**"
    text = META.format(worst=worst, goal=result["goal"], reached=reached)
    title = heading("Memory of a GPU, counted without one", result["environment"])
    return "\n\n".join([title, text, table(header, lines)])
