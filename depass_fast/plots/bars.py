"""Bars: signed scores of labelled components, side by side or one below the other, in a sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .frame import Caption, axes_of, points_of, side_label, write_caption
from .look import NEGATIVE, OTHERS, POSITIVE, paper, sign_colour
from .words import LONGEST, fitting

_ROW, _MARGIN = 0.15, 0.42  # inches of a bar, and of the axis below
_SHORT, _ROOM = 12, 1.4  # characters of a label at a bar's end, and how much longer the axis is for it
_MANY = 200  # bars that are drawn without a gap
_BEYOND = 1.12  # the axis ends there, in sizes of the largest component


@dataclass(frozen=True)
class Bar:
    """A bar: its label, its value, that value as text, and an error. Components are ``ranked``; `others`, `rest`
    and `bias` are grey, and may be longer than the axis.
    """

    label: str
    value: float
    number: str = ""
    ranked: bool = True
    error: float = 0.0


def rows(bars: Sequence[Bar], axis: str, caption: Caption, ax: Any = None, width: str | float | None = None) -> Any:
    """Draw bars one below the other, the first on top, with their numbers beside them; return the Axes.

    The axis is as long as the largest component needs. A grey bar that goes beyond is cut by its edge, with an arrow;
    its number says how long it is.
    """
    own = ax is None
    with paper():
        ax = axes_of(ax, width, _MARGIN + _ROW * len(bars))
        labels, families = fitting([bar.label for bar in bars], LONGEST)
        places = range(len(bars))
        errors = [bar.error for bar in bars]
        ax.barh(
            places,
            [bar.value for bar in bars],
            height=0.72,
            color=[sign_colour(bar.value) if bar.ranked else OTHERS for bar in bars],
            xerr=errors if any(errors) else None,
            error_kw={"elinewidth": 0.8, "ecolor": "#444444"},
        )
        _limits(ax, bars, "x")
        ax.axvline(0, color=_line_colour(), linewidth=0.6)
        ax.set_yticks(places, labels, fontfamily=families)
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.set_ylim(len(bars) - 0.5, -0.5)
        _few_ticks(ax.xaxis, 4)
        ax.set_xlabel(axis)
        _numbers(ax, bars)
        write_caption(ax, caption, own)
    return ax


def _numbers(ax: Any, bars: Sequence[Bar]) -> None:
    """Write the bars' numbers in a column at the right."""
    long = max((len(bar.number) for bar in bars), default=0)
    for place, bar in enumerate(bars):
        if bar.number:
            ax.annotate(
                bar.number.replace("-", "−"),
                (1.0, place),
                xycoords=("axes fraction", "data"),
                xytext=(3.9 * long + 3, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=6.5,
                annotation_clip=False,
            )


def columns(
    bars: Sequence[Bar],
    axis: str,
    caption: Caption,
    ax: Any = None,
    width: str | float | None = None,
    place: str = "position",
    named: int = 8,
) -> Any:
    """Draw bars side by side, such as the tokens of a prompt in their order; return the Axes.

    Where there is no room for every label, ``named`` of the largest are written at their bars, and the axis counts
    positions.
    """
    own = ax is None
    with paper():
        ax = axes_of(ax, width, 1.9, "column" if len(bars) <= 24 else "page")
        labels, families = fitting([bar.label for bar in bars], LONGEST)
        _upright(ax, bars)
        ax.axhline(0, color=_line_colour(), linewidth=0.6)
        _limits(ax, bars, "y")
        ax.set_xlim(-0.6, len(bars) - 0.4)
        _few_ticks(ax.yaxis, 5)
        wide, high = points_of(ax)
        ax.set_ylabel(side_label(axis, high))
        if len(bars) * 8 <= wide:
            ax.set_xticks(range(len(bars)), labels, rotation=90, fontfamily=families)
            ax.tick_params(axis="x", length=0)
            ax.spines["bottom"].set_visible(False)
        else:
            ax.set_xlabel(place)
            order = sorted(range(len(bars)), key=lambda k: (bars[k].ranked, -abs(bars[k].value)))
            grey = sum(not bar.ranked for bar in bars)
            labels, families = fitting([bar.label for bar in bars], _SHORT)
            _named(ax, bars, labels, families, _apart(order[: named + grey], wide / len(bars)))
        write_caption(ax, caption, own)
    return ax


def _upright(ax: Any, bars: Sequence[Bar]) -> None:
    """Draw bars side by side; many of them as one collection, which takes a tenth of the time."""
    values = [bar.value for bar in bars]
    colours = [sign_colour(bar.value) if bar.ranked else OTHERS for bar in bars]
    if len(bars) <= _MANY:
        ax.bar(range(len(bars)), values, width=0.78, color=colours)
        return
    from matplotlib.collections import PolyCollection  # pyright: ignore[reportMissingImports] (the extra `plot`)

    shapes = [[(k - 0.5, 0.0), (k - 0.5, v), (k + 0.5, v), (k + 0.5, 0.0)] for k, v in enumerate(values)]
    ax.add_collection(PolyCollection(shapes, facecolors=colours, linewidths=0))


def _named(ax: Any, bars: Sequence[Bar], labels: Sequence[str], families: list[str], which: Sequence[int]) -> None:
    """Write labels at the ends of some bars, and let the axis have room for them."""
    low, high = ax.get_ylim()
    ups = {bars[k].value >= 0 for k in which}
    ax.set_ylim(low * _ROOM if False in ups else low, high * _ROOM if True in ups else high)
    for k in which:
        up = bars[k].value >= 0
        ax.annotate(
            labels[k],
            (k, min(max(bars[k].value, low), high)),
            xytext=(0, 2 if up else -2),
            textcoords="offset points",
            ha="center",
            va="bottom" if up else "top",
            rotation=90,
            fontsize=6,
            fontfamily=families,
            annotation_clip=False,
        )


def _apart(order: Sequence[int], wide: float) -> list[int]:
    """Return the first of some bars whose upright labels do not cover each other; a bar takes ``wide`` points."""
    kept: list[int] = []
    for k in order:
        if all(abs(k - other) * wide >= 8 for other in kept):
            kept.append(k)
    return kept


def grouped(
    values: Sequence[Sequence[float]],
    names: Sequence[str],
    places: Sequence[int],
    axis: str,
    caption: Caption,
    ax: Any = None,
    width: str | float | None = None,
) -> Any:
    """Draw a group of bars at every layer of ``places``: ``values`` (groups, names); return the Axes."""
    own = ax is None
    with paper():
        ax = axes_of(ax, width, 1.6, "column" if len(places) <= 16 else "page")
        wide = 0.8 / len(names)
        fills = ((POSITIVE, NEGATIVE), ("#f2c7a5", "#b3d3f2"), ("#7b4b94", "#3a7d44"))
        for k, name in enumerate(names):
            heights = [row[k] for row in values]
            at = [place + (k - (len(names) - 1) / 2) * wide for place in range(len(places))]
            colours = [fills[k % 3][value < 0] for value in heights]
            ax.bar(at, heights, width=wide * 0.92, color=colours, label=name, edgecolor="#555555", linewidth=0.3)
        ax.axhline(0, color=_line_colour(), linewidth=0.6)
        every = 1 + len(places) // 16
        ax.set_xticks(range(0, len(places), every), [str(place) for place in places[::every]])
        ax.set_xlim(-0.6, len(places) - 0.4)
        ax.tick_params(axis="x", length=0)
        ax.set_xlabel("layer")
        ax.set_ylabel(side_label(axis, points_of(ax)[1]))
        _few_ticks(ax.yaxis, 5)
        if len(names) > 1:
            _legend(ax, names, fills)
        write_caption(ax, caption, own)
    return ax


def _legend(ax: Any, names: Sequence[str], fills: Sequence[tuple[str, str]]) -> None:
    from matplotlib.patches import Patch  # pyright: ignore[reportMissingImports] (the extra `plot`)

    pairs = [
        (Patch(facecolor=fills[k % 3][0], edgecolor="#555555"), Patch(facecolor=fills[k % 3][1], edgecolor="#555555"))
        for k in range(len(names))
    ]
    from matplotlib.legend_handler import HandlerTuple  # pyright: ignore[reportMissingImports] (the extra `plot`)

    handler: Any = {tuple: HandlerTuple(ndivide=None, pad=0)}
    ax.legend(pairs, list(names), handler_map=handler, loc="best", handlelength=1.8, borderaxespad=0.2)


def _limits(ax: Any, bars: Sequence[Bar], which: str) -> None:
    """Let an axis hold the components, and of the grey bars what fits on it."""
    ranked = [value for bar in bars if bar.ranked for value in (bar.value - bar.error, bar.value + bar.error)]
    shown = [value for value in ranked or [bar.value for bar in bars] if value == value]
    low, high = min([0.0, *shown]), max([0.0, *shown])
    grey = [bar.value for bar in bars if not bar.ranked]
    size = _BEYOND * (max(-low, high) or 1.0)
    low = max(-size, min([low * _BEYOND, *(value * _BEYOND for value in grey)]))
    high = min(size, max([high * _BEYOND, *(value * _BEYOND for value in grey)]))
    (ax.set_xlim if which == "x" else ax.set_ylim)(low, high)
    for place, bar in enumerate(bars):
        if not bar.ranked and not low <= bar.value <= high:
            _arrow(ax, place, high if bar.value > 0 else low, which, bar.value > 0)


def _arrow(ax: Any, place: int, end: float, which: str, positive: bool) -> None:
    """Mark a bar that goes on beyond the axis."""
    marker = (">" if positive else "<") if which == "x" else ("^" if positive else "v")
    at = (end, place) if which == "x" else (place, end)
    ax.plot(*at, marker, color=OTHERS, markersize=4, clip_on=False, markeredgewidth=0)


def _few_ticks(axis: Any, count: int) -> None:
    from matplotlib.ticker import MaxNLocator  # pyright: ignore[reportMissingImports] (the extra `plot`)

    axis.set_major_locator(MaxNLocator(count))


def _line_colour() -> str:
    from matplotlib import rcParams  # pyright: ignore[reportMissingImports] (the extra `plot`)

    return rcParams["axes.edgecolor"]
