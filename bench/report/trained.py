"""The section of RESULTS.md that `python -m bench.studies.trained` fills."""

from __future__ import annotations

from ..core.markdown import heading, table


def section(result: dict) -> str:
    """`bench.studies.trained`: true and estimated errors of the default sweep, at the layers that were compared."""
    layers = [row["layer"] for row in result["prompts"][0]["layers"]]
    text = (
        f"{result['model']}: all neurons by the default sweep, against exact propagation. The relative error of a "
        "start layer's neurons, with the estimate in brackets."
    )
    header = ["prompt", "tokens", *(f"layer {layer}" for layer in layers), "warnings"]
    rows = [
        [f"`{one['prompt'][:44]!r}`", str(one["tokens"])]
        + [f"{row['error']:.2%} ({row['estimate']:.2%})" for row in one["layers"]]
        + ["; ".join(one["warnings"] or []) or "none"]
        for one in result["prompts"]
    ]
    return "\n\n".join([heading("trained", result["environment"]), text, table(header, rows)])
