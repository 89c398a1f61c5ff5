"""The frame of a picture: its Axes, the user's or new ones, and above them title, sums, completeness and warnings."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .look import WARNING, inches
from .words import fitting

_SMALL = 6.5  # points of notes
_LINE = 1.3  # line height
_BAR = 110.0  # points of a colour bar, at most


@dataclass(frozen=True)
class Caption:
    """The words above a picture: what was read, how its parts sum up, and what is to be known before relying on it."""

    title: str
    notes: Sequence[str] = ()
    warnings: Sequence[str] = ()


def axes_of(ax: Any, width: str | float | None, height: float, default: str = "column") -> Any:
    """Return the Axes given, or those of a new pyplot figure of that width and height (inches), laid out tightly.

    ``default`` is the width for None.

    Raises:
        TypeError: ``ax`` is given and is no matplotlib Axes.
        ValueError: the width is no width.
    """
    from matplotlib.axes import Axes  # pyright: ignore[reportMissingImports] (the extra `plot`)

    size = (inches(width, default), height)
    if ax is None:
        from matplotlib import pyplot  # pyright: ignore[reportMissingImports] (the extra `plot`)

        return pyplot.subplots(figsize=size, layout="constrained")[1]
    if not isinstance(ax, Axes):
        raise TypeError(f"ax: expected matplotlib Axes, got {type(ax).__name__}.")
    _dress(ax)
    return ax


def _dress(ax: Any) -> None:
    """Give the user's Axes the sizes and lines that those of our own are made with."""
    from matplotlib import rcParams  # pyright: ignore[reportMissingImports] (the extra `plot`)

    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        ax.spines[side].set_linewidth(rcParams["axes.linewidth"])
    width, length = rcParams["xtick.major.width"], rcParams["xtick.major.size"]
    ax.tick_params(width=width, length=length, labelsize=rcParams["xtick.labelsize"])
    for axis in (ax.xaxis, ax.yaxis):
        axis.label.set_size(rcParams["axes.labelsize"])


def points_of(ax: Any) -> tuple[float, float]:
    """Return the width and height of Axes in points, as its figure is laid out now."""
    root = ax.figure.figure  # that of a subfigure is the whole
    root.draw_without_rendering()
    box = ax.get_window_extent()
    return box.width * 72 / root.dpi, box.height * 72 / root.dpi


def colour_bar(ax: Any, mapped: Any, **more: Any) -> Any:
    """Return a colour bar beside Axes, not longer than a few centimetres."""
    high = points_of(ax)[1]
    length = min(high, _BAR)
    bar = ax.figure.colorbar(
        mapped, ax=ax, shrink=length / high, anchor=(0.0, 1.0), aspect=length / 7.0, pad=0.02, fraction=0.08, **more
    )
    bar.outline.set_linewidth(0.4)  # pyright: ignore[reportCallIssue]
    bar.ax.tick_params(labelsize=_SMALL)
    return bar


def beyond(values: Any, limit: float) -> str:
    """Return at which ends of a colour bar there are scores beyond ±``limit``: "neither", "min", "max" or "both"."""
    known = np.asarray(values, dtype=np.float64)
    low, high = bool((known < -limit * 1.0001).any()), bool((known > limit * 1.0001).any())
    return {(True, True): "both", (True, False): "min", (False, True): "max"}.get((low, high), "neither")


def write_caption(ax: Any, caption: Caption, own: bool) -> None:
    """Write title, notes and warnings above finished Axes, from the left edge of their labels on, in wrapped lines.

    The uppermost of them is the left title of the Axes, whose width moves nothing in a layout. A figure of our ``own``
    grows by their height.
    """
    from matplotlib import rcParams  # pyright: ignore[reportMissingImports] (the extra `plot`)

    root = ax.figure.figure
    points_of(ax)
    inner, outer = ax.get_window_extent(), ax.get_tightbbox()
    left = (outer.x0 - inner.x0) / inner.width
    end = root.bbox.x1 if own else max(inner.x1, outer.x1)
    room, height = (end - outer.x0) * 72 / root.dpi - 2, 4.0
    parts = (
        ("\n".join(caption.warnings), {"fontsize": _SMALL, "color": WARNING}),
        ("\n".join(caption.notes), {"fontsize": _SMALL, "alpha": 0.7}),
        (caption.title, {"fontsize": rcParams["axes.titlesize"]}),
    )
    parts = [part for part in parts if part[0]]  # from the Axes upwards
    for number, (text, look) in enumerate(parts, 1):
        lines, families = _wrapped(text, room, look["fontsize"])
        how: Any = {**look, "fontfamily": families, "linespacing": _LINE}
        if number == len(parts):
            ax.set_title("\n".join(lines), loc="left", x=left, pad=height, **how)
        else:
            at: Any = {"xycoords": "axes fraction", "textcoords": "offset points", "annotation_clip": False}
            below = ax.annotate("\n".join(lines), (left, 1.0), xytext=(0, height), va="bottom", **at, **how)
            below.set_in_layout(False)
        height += look["fontsize"] * _LINE * len(lines) + 2.5
    if own:
        root.set_figheight(root.get_figheight() + height / 72)


def side_label(text: str, points: float) -> str:
    """Return the label of an upright axis in lines that fit into its length."""
    return "\n".join(textwrap.wrap(text, max(8, int(points / 4.1)), break_long_words=False))


def _wrapped(text: str, room: float, size: float) -> tuple[list[str], list[str]]:
    """Return a text in lines that fit into ``room`` points, and the font families to draw it with."""
    from matplotlib.font_manager import FontProperties  # pyright: ignore[reportMissingImports] (the extra `plot`)
    from matplotlib.textpath import TextPath  # pyright: ignore[reportMissingImports] (the extra `plot`)

    (text,), families = fitting([text])
    text = re.sub(r"'[^'\n]*'", lambda quoted: quoted[0].replace(" ", "\u00a0"), text)  # tokens are not broken
    flat = text.replace("\n", " ")
    wide = TextPath((0, 0), flat, prop=FontProperties(family=families, size=size)).get_extents().width / len(flat)
    lines = [textwrap.wrap(line, max(12, int(0.97 * room / wide))) for line in text.split("\n")]
    return [part.replace("\u00a0", " ") for line in lines for part in line], families
