"""The section of RESULTS.md that `python -m bench.studies.ablation` fills."""

from __future__ import annotations

from ..core.markdown import duration, heading, mebibytes, table

TEXT = """Which neurons does a logit depend on? Ablation sets one neuron's activation to zero, or to its mean, at
all positions and reads by how much the logit falls: that is the measure, a counterfactual. *One at a time* runs the
model once for every neuron, as published. *Fair ablation* gets the same numbers as fast as it can be done without an
approximation (`bench/baselines/fair_ablation.py`), at its best batch size. *Attribution patching* is the first order of
ablation, from one backward pass. DePass asks another question: not by how much the logit would fall, but which share of
it the neuron brought. The tables hold the agreement of its shares with the measured effect. Attribution patching comes
closer to ablation, in less time: that is no surprise, for it approximates just that. The shares alone have another
property: together with `rest` they sum to the logit. Every time includes the method's own forward pass. Zero-ablation
is timed; mean-ablation is the same arithmetic. "All layers" is every layer in turn, or one sweep where a method has
one."""

QUALITY_TEXT = """Quality is measured on {n_prompts} held-out prompts of the demo model, half of them indirect
objects, half facts; the logit is the right answer's. Against the effect of zero-ablation and of mean-ablation
(means over {corpus} training texts, all positions after the BOS): Spearman's rank correlation over the neurons, and
the share of the top 1 % by magnitude that is the same. Figures are medians over the prompts with [p20, p80]. DePass has
one set of shares for both."""


def section(result: dict) -> str:
    """Speeds, then the quality over all layers, then the quality by layer."""
    parts = [heading("Race of neurons", result["environment"]), TEXT, _speeds(result["rows"])]
    searches = [f"{s['batch']} ({s['model']}, {s['workload']}, {s['seconds']:.1f} s)" for s in result["search"]]
    parts.append(f"Batch sizes of the fair ablation, and how long the search for each took: {'; '.join(searches)}.")
    if result.get("quality"):
        place = result.get("quality_environment", result["environment"])
        parts.append(f"Quality was measured at commit {place['commit']} ({place['date']}).")
        parts += [QUALITY_TEXT.format_map(result), _quality(result["quality"]), _by_layer(result["quality"])]
    return "\n\n".join(parts)


SCALE = """The race in the shape of a real model (`python -m bench.studies.ablation --scale`). Ablations ran for a
sample of neurons and are scaled up; exact propagation of all layers is scaled from one layer where the table says so.
Peaks are beyond the model's weights."""


def scale_section(result: dict) -> str:
    """The race at scale: a row per method for one layer, and one for all layers."""
    header = ["workload", "provider", "model", "tokens", "neurons", "neurons/s", "time", "peak", "scaled up from"]
    lines = []
    for row in sorted(result["rows"], key=lambda row: row["workload"], reverse=True):
        sample = [] if row["sample"] is None else [f"{row['sample']} neurons"]
        lines.append(
            [
                row["workload"],
                row["provider"],
                row["model"],
                str(row["length"]),
                f"{row['neurons']:,}",
                f"{row['neurons_per_s']:,.0f}",
                duration(row["seconds"]),
                mebibytes(row["peak_bytes"]),
                "; ".join(sample + ([] if row["scaled"] is None else [row["scaled"]])) or "-",
            ]
        )
    return "\n\n".join([heading("Race of neurons at scale", result["environment"]), SCALE, table(header, lines)])


def _speeds(rows: list[dict]) -> str:
    header = ["workload", "provider", "model", "tokens", "neurons", "neurons/s", "time", "[p20, p80]", "peak"]
    lines = []
    for row in rows:
        scaled = "" if row["sample"] is None else f" (from {row['sample']})"
        lines.append(
            [
                row["workload"],
                row["provider"],
                row["model"],
                str(row["length"]),
                str(row["neurons"]),
                f"{row['neurons_per_s']:,.0f}",
                duration(row["seconds"]) + scaled,
                f"[{duration(row['p20_s'])}, {duration(row['p80_s'])}]",
                mebibytes(row["peak_bytes"]),
            ]
        )
    note = "(from n): n neurons were ablated, spread over the layers, and the time is scaled up in forward passes."
    return table(header, lines) + ("\n\n" + note if any(row["sample"] is not None for row in rows) else "")


def _quality(found: dict) -> str:
    header = [
        "provider",
        "ablation",
        "Spearman, layer 0",
        "top 1 %, layer 0",
        "Spearman, all layers",
        "top 1 %, all layers",
    ]
    lines = []
    for name, kinds in found.items():
        for kind, metrics in kinds.items():
            cells = [
                _spread(metrics[metric]["layers"][0] if where == "0" else metrics[metric]["all"])
                for where in ("0", "all")
                for metric in ("spearman", "top1_overlap")
            ]
            lines.append([name, kind, *cells])
    return table(header, lines, left=2)


def _by_layer(found: dict) -> str:
    layers = range(len(next(iter(found.values()))["zero"]["spearman"]["layers"]))
    lines = [
        [name, kind, *(f"{metrics['spearman']['layers'][layer]['median']:.3f}" for layer in layers)]
        for name, kinds in found.items()
        for kind, metrics in kinds.items()
    ]
    title = "Spearman by layer, median over the prompts:"
    return title + "\n\n" + table(["provider", "ablation", *(f"layer {i}" for i in layers)], lines, left=2)


def _spread(s: dict) -> str:
    return f"{s['median']:.3f} [{s['p20']:.3f}, {s['p80']:.3f}]"
