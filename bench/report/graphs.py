"""The section of the results page on graphs of a trained model."""

from __future__ import annotations

from ..core.markdown import duration, heading, percent, table

TEXT = """`python -m bench.studies.graphs`: graphs of 200 nodes for the log-probability of the model's own next token.
"Pruned": the part of all influence that ends in neurons that are no nodes. The second table compares, over every eighth
node by its share, the effect that the graph predicts for taking it out with the model's: Spearman's rank correlation,
and in brackets how often the signs agree, and of how many nodes."""


def section(result: dict) -> str:
    """A table of sizes, and one of agreement."""
    rows = result["rows"]
    sizes = [
        [
            repr(row["prompt"][:48]),
            str(row["tokens"]),
            duration(row["seconds"]),
            f"{row['file_bytes'] / 1e6:.2f} MB",
            f"{row['edges']:,}",
            percent(row["pruned_influence"]),
            f"{row['completeness_error']:.0e}",
        ]
        for row in rows
    ]
    agreed = [
        [repr(row["prompt"][:48]), way, *(_cell(*kinds[kind]) for kind in ("head", "neuron", "both"))]
        for row in rows
        for way, kinds in row["agreement"].items()
    ]
    header = ["prompt", "tokens", "time", "file", "edges", "pruned", "completeness"]
    parts = [heading(f"Graphs of {rows[0]['model']}", result["environment"]), TEXT, table(header, sizes, 1)]
    return "\n\n".join([*parts, table(["prompt", "change", "heads", "neurons", "both"], agreed, 2)])


def _cell(rank: float, signs: float, count: int) -> str:
    return f"{rank:.2f} ({signs:.0%}; {count})"
