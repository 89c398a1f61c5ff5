"""The section of RESULTS.md that `python -m bench.studies.trained` fills."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from depass_fast.evaluate.studies.adjoint import RIGHT, WRONG, is_named

from ..core.markdown import duration, heading, table

BANDS = (0.0, 0.001, 0.005, 0.01, RIGHT, WRONG, np.inf)


def section(result: dict) -> str:
    """`bench.studies.trained`: true and estimated errors of the default sweep, at the layers that were compared."""
    prompts = result["prompts"]
    every = [(row, is_named(row["layer"], one["warnings"])) for one in prompts for row in one["layers"]]
    wrong = [named for row, named in every if row["error"] > WRONG]
    right = [named for row, named in every if row["error"] <= RIGHT]
    text = (
        f"{result['model']}: all neurons by the default sweep, against exact propagation: {len(every)} start layers of "
        f"{len(prompts)} prompts. Errors are relative, of the neurons of a start layer; the estimate's in brackets. "
        f"Warnings name {sum(wrong)} of the {len(wrong)} layers above {WRONG:.0%}, and {sum(right)} of the "
        f"{len(right)} up to {RIGHT:.0%}."
    )
    commits = {one["commit"] for one in prompts if "commit" in one} - {result["environment"]["commit"]}
    if commits:
        text += f" Some prompts were measured at {', '.join(sorted(commits))}."
    return "\n\n".join([heading("trained", result["environment"]), text, _by_prompt(prompts), _by_error(every)])


def _by_prompt(prompts: list[dict]) -> str:
    header = ["prompt", "warnings", "tokens", "layers", "median", "worst", "worst layer", "sweep", "exact"]
    rows = []
    for one in prompts:
        worst = max(one["layers"], key=lambda row: row["error"])
        rows.append(
            [f"`{one['prompt'][:44]!r}`", "; ".join(one["warnings"] or []) or "none", str(one["tokens"])]
            + [str(len(one["layers"])), f"{np.median([row['error'] for row in one['layers']]):.2%}"]
            + [f"{worst['error']:.2%} ({worst['estimate']:.2%})", str(worst["layer"])]
            + [duration(one[key]) if key in one else "-" for key in ("seconds", "exact_seconds")]
        )
    return table(header, rows, left=2)


def _by_error(every: list[tuple[dict, bool]]) -> str:
    """The truth of the estimate: its ratio to the error, by the size of the error."""
    header = ["error", "start layers", "named", "estimate / error: p20", "median", "p80"]
    rows = []
    for low, high in pairwise(BANDS):
        here = [(row, named) for row, named in every if low < row["error"] <= high]
        if not here:
            continue
        ratios = np.percentile([row["estimate"] / row["error"] for row, _ in here], [20, 50, 80])
        size = f"above {low:.1%}" if high == np.inf else f"{low:.1%} to {high:.1%}"
        rows.append([size, str(len(here)), str(sum(named for _, named in here)), *(f"{r:.2g}" for r in ratios)])
    return table(header, rows, left=1)
