"""The picture of a result: panels side by side, the same file from the same figures. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..plots import SERIES, paper, save
from ..plots.look import STYLES
from .tables import Panel


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Draw panels into an SVG file.

    Raises:
        ValueError: there are none: this study has no curves.
        ImportError: matplotlib is not installed.
    """
    if not panels:
        raise ValueError("plot: this study has no curves; its tables say all.")
    with paper():
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports] (the extra `plot`)

        figure = Figure(figsize=(4.0 * len(panels) + 1.9, 3.2), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)
        names = list(dict.fromkeys(name for panel in panels for name in (*panel.lines, *panel.points)))
        for axis, panel in zip(axes[0], panels, strict=True):
            _panel(axis, panel, names)
        shown = {line.get_label(): line for axis in axes[0] for line in axis.lines}
        figure.legend(shown.values(), shown.keys(), loc="outside right upper")
    save(figure, path)


def _panel(axis: Any, panel: Panel, names: Sequence[str]) -> None:
    """Draw one panel; a name has the same colour and style in all of them."""
    for name, (x, y) in panel.lines.items():
        number = names.index(name)
        colour, style = SERIES[number % len(SERIES)], STYLES[number // len(SERIES) % len(STYLES)]
        axis.plot(x, y, style, color=colour, marker=".", markersize=4, linewidth=1.2, label=name)
        if name in panel.bands:
            axis.fill_between(*panel.bands[name], color=colour, alpha=0.1, linewidth=0)
    for name, (x, y) in panel.points.items():
        colour = SERIES[names.index(name) % len(SERIES)]
        axis.plot(x, y, "o", color=colour, markersize=4, markeredgewidth=0, alpha=0.7, label=name)
    if panel.log_x:
        axis.set_xscale("log")
    if panel.log_y:
        axis.set_yscale("log")
    axis.set_title(panel.title)
    axis.set_xlabel(panel.x)
    axis.set_ylabel(panel.y)
    axis.grid(True)
