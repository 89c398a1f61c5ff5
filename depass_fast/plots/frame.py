"""The frame of a picture: its Axes, the user's or new ones, and above them title, sums, completeness and warnings."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .look import WARNING, inches
from .words import fitting

_SMALL = 6.5  # points of notes
_LINE = 1.3  # line height


@dataclass(frozen=True)
class Caption:
    """The words above a picture: what was read, how its parts sum up, and what is to be known before relying on it."""

    title: str
    notes: Sequence[str] = ()
    warnings: Sequence[str] = ()


def axes_of(ax: Any | None, width: str | float, height: float) -> Any:
    """Return the Axes given, or those of a new pyplot figure of that width and height (inches), laid out tightly.

    Raises:
        TypeError: ``ax`` is given and is no matplotlib Axes.
        ValueError: the width is no width.
    """
    from matplotlib.axes import Axes  # pyright: ignore[reportMissingImports] (the extra `plot`)

    size = (inches(width), height)
    if ax is None:
        from matplotlib import pyplot  # pyright: ignore[reportMissingImports] (the extra `plot`)

        return pyplot.subplots(figsize=size, layout="constrained")[1]
    if not isinstance(ax, Axes):
        raise TypeError(f"ax: expected matplotlib Axes, got {type(ax).__name__}.")
    return ax


def points_of(ax: Any) -> tuple[float, float]:
    """Return the width and height of Axes in points, as its figure is laid out now."""
    root = ax.figure.figure  # that of a subfigure is the whole
    root.draw_without_rendering()
    box = ax.get_window_extent()
    return box.width * 72 / root.dpi, box.height * 72 / root.dpi


def write_caption(ax: Any, caption: Caption, own: bool) -> None:
    """Write title, notes and warnings above finished Axes, from the left edge of their labels on, in wrapped lines.

    They are the left, the centre and the right title of the Axes, whose widths move nothing in a layout. A figure of
    our ``own`` grows by their height.
    """
    from matplotlib import rcParams  # pyright: ignore[reportMissingImports] (the extra `plot`)

    root = ax.figure.figure
    points_of(ax)
    inner, outer = ax.get_window_extent(), ax.get_tightbbox()
    left = (outer.x0 - inner.x0) / inner.width
    end = root.bbox.x1 if own else max(inner.x1, outer.x1)
    room, height = (end - outer.x0) * 72 / root.dpi - 2, 4.0
    parts = (
        ("right", "\n".join(caption.warnings), {"fontsize": _SMALL, "color": WARNING}),
        ("center", "\n".join(caption.notes), {"fontsize": _SMALL, "alpha": 0.7}),
        ("left", caption.title, {"fontsize": rcParams["axes.titlesize"]}),
    )
    for place, text, look in parts:  # from the Axes upwards
        if text:
            lines, families = _wrapped(text, room, look["fontsize"])
            title = ax.set_title("\n".join(lines), loc=place, x=left, y=1.0, fontfamily=families, **look)
            title.set(horizontalalignment="left", linespacing=_LINE)
            title.set_transform(_above(ax, height))
            height += look["fontsize"] * _LINE * len(lines) + 2.5
    if own:
        root.set_figheight(root.get_figheight() + height / 72)


def _above(ax: Any, points: float) -> Any:
    """Return the coordinates of Axes, moved up by ``points``."""
    from matplotlib.transforms import ScaledTranslation  # pyright: ignore[reportMissingImports] (the extra `plot`)

    return ax.transAxes + ScaledTranslation(0, points / 72, ax.figure.dpi_scale_trans)


def side_label(text: str, points: float) -> str:
    """Return the label of an upright axis in lines that fit into its length."""
    return "\n".join(textwrap.wrap(text, max(8, int(points / 4.1))))


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
