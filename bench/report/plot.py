"""The picture of grouped attribution, docs/grouping.svg: ``python -m bench.report.plot bench/results/grouping.json``.

Needs matplotlib: ``pip install -c constraints.txt -e ".[bench]"``.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..core.cli import command, picture
from ..core.results import ROOT

PICTURE = ROOT / "docs" / "grouping.svg"
PANELS = {
    "relative_error": "‖grouped − exact‖ / ‖exact‖",
    "spearman": "Spearman with exact",
    "top1_overlap": "top 1 % in common",
    "sum_ratio": "sum of all neurons / exact sum",
}
COLOURS, STYLES = ("#1b6ca8", "#c1440e", "#3a7d44", "#7b4b94"), {"contiguous": "-", "random": "--"}


def plot(result: dict, path: Path) -> None:
    """Error and agreement over the number of groups, a line for every layer and grouping; bands are p20 to p80."""
    import matplotlib  # pyright: ignore[reportMissingImports] (the extra `bench`)

    matplotlib.use("svg")
    import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports] (the extra `bench`)

    plt.rcParams |= {
        "svg.hashsalt": "depass",
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    figure, axes = plt.subplots(1, len(PANELS), figsize=(13, 3.2), layout="constrained")
    ticks = sorted({row["groups"] for row in result["rows"]})[::2]
    layers = sorted({row["layer"] for row in result["rows"]})
    for axis, (figure_name, title) in zip(axes, PANELS.items(), strict=True):
        for layer, colour in zip(layers, COLOURS, strict=False):
            for grouping, style in STYLES.items():
                rows = [r for r in result["rows"] if (r["layer"], r["grouping"]) == (layer, grouping)]
                x = [r["groups"] for r in rows]
                spread = [r[figure_name] for r in rows]
                label = f"layer {layer}, {grouping} groups"
                axis.plot(x, [s["median"] for s in spread], style, color=colour, marker=".", label=label)
                axis.fill_between(x, [s["p20"] for s in spread], [s["p80"] for s in spread], color=colour, alpha=0.1)
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("number of groups")
        axis.grid(alpha=0.25)
    axes[0].set_yscale("symlog", linthresh=0.01)
    axes[0].set_ylim(bottom=0)
    axes[0].legend(frameon=False, fontsize=7.5)
    figure.savefig(path, metadata={"Date": None, "Creator": None})


def main(arguments: list[str] | None = None) -> None:
    parser = command("bench.report.plot", __doc__)
    parser.add_argument("result", type=Path, help="the JSON file that bench.studies.grouping wrote")
    parser.add_argument("--out", type=picture, default=str(PICTURE))
    options = parser.parse_args(arguments)
    plot(json.loads(options.result.read_text()), options.out)


if __name__ == "__main__":
    main()
