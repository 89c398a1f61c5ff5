"""The section of RESULTS.md that `python -m bench.studies.adjoint` fills."""

from __future__ import annotations

from ..core.markdown import heading, table


def section(result: dict) -> str:
    """`bench.studies.adjoint`: agreement at every start layer, speed, the gain of each part, faithfulness."""
    goals = result["goals"]
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
    parts = [heading("adjoint", result["environment"]), text, table(header, rows)]
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
