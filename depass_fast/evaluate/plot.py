"""The picture of a result: panels side by side, the same file from the same figures. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .tables import Panel

COLOURS = ("#1b6ca8", "#c1440e", "#3a7d44", "#7b4b94", "#b8860b", "#4a4a4a", "#d1689d", "#2aa198")
STYLES = ("-", "--", ":", "-.")


def check_matplotlib() -> None:
    """Raise ImportError where matplotlib is not installed, naming the extra that brings it."""
    try:
        import matplotlib  # noqa: F401  # pyright: ignore[reportMissingImports] (the extra `evaluate`)
    except ImportError as error:
        raise ImportError("plot: a picture needs matplotlib: pip install 'depass-fast[evaluate]'.") from error


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Draw panels into an SVG file.

    Raises:
        ValueError: there are none: this study has no curves.
    """
    if not panels:
        raise ValueError("plot: this study has no curves; its tables say all.")
    check_matplotlib()
    import matplotlib  # pyright: ignore[reportMissingImports] (the extra `evaluate`)

    matplotlib.use("svg")
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports] (the extra `evaluate`)

    look: Any = {
        "svg.hashsalt": "depass_fast",
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with pyplot.rc_context(look):
        size = (4.4 * len(panels) + 2.0, 3.6)
        figure, axes = pyplot.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
        names = list(dict.fromkeys(name for panel in panels for name in (*panel.lines, *panel.points)))
        for axis, panel in zip(axes[0], panels, strict=True):
            _panel(axis, panel, names)
        shown = {line.get_label(): line for axis in axes[0] for line in axis.lines}
        figure.legend(shown.values(), shown.keys(), loc="outside right upper", frameon=False, fontsize=7.5)
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)


def _panel(axis: Any, panel: Panel, names: Sequence[str]) -> None:
    """Draw one panel; a name has the same colour and style in all of them."""
    for name, (x, y) in panel.lines.items():
        number = names.index(name)
        colour, style = COLOURS[number % len(COLOURS)], STYLES[number // len(COLOURS) % len(STYLES)]
        axis.plot(x, y, style, color=colour, marker=".", markersize=4, linewidth=1.2, label=name)
        if name in panel.bands:
            axis.fill_between(*panel.bands[name], color=colour, alpha=0.1, linewidth=0)
    for name, (x, y) in panel.points.items():
        colour = COLOURS[names.index(name) % len(COLOURS)]
        axis.plot(x, y, "o", color=colour, markersize=4, markeredgewidth=0, alpha=0.7, label=name)
    if panel.log_x:
        axis.set_xscale("log")
    if panel.log_y:
        axis.set_yscale("log")
    axis.set_title(panel.title, fontsize=9)
    axis.set_xlabel(panel.x)
    axis.set_ylabel(panel.y)
    axis.grid(alpha=0.25)
