"""Curves: how few components hold how much of all that is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .frame import Caption, axes_of, colour_bar, write_caption
from .look import SERIES, STYLES, paper

_EACH = 8  # curves that have a colour and a label of their own; more are coloured by their order


def cumulative(
    scores: Mapping[str, Sequence[float]],
    components: str,
    caption: Caption,
    ax: Any = None,
    width: str | float | None = None,
    order: str = "layer",
) -> Any:
    """Draw, for each name, the share of Σ|score| that the k largest |scores| hold, over k; return the Axes.

    With more than eight names the curves are coloured from the first to the last, and a bar says their ``order``.
    """
    own = ax is None
    with paper():
        from matplotlib.ticker import MaxNLocator  # pyright: ignore[reportMissingImports] (the extra `plot`)

        ax = axes_of(ax, width, 2.0)
        many = len(scores) > _EACH
        colours = _in_order(len(scores)) if many else [SERIES[k % len(SERIES)] for k in range(len(scores))]
        longest = max((len(values) for values in scores.values()), default=1)
        for k, (name, values) in enumerate(scores.items()):
            sizes = np.sort(np.abs(np.asarray(values, dtype=np.float64)))[::-1]
            total = sizes.sum() or 1.0
            style = "-" if many else STYLES[k % len(STYLES)]
            x, y = np.arange(1, len(sizes) + 1), 100 * sizes.cumsum() / total
            ax.plot(x, y, style, color=colours[k], label=name, linewidth=0.8 if many else 1.2)
            if len(scores) == 1:
                _halves(ax, y)
        if longest > 30:
            ax.set_xscale("log")
            ax.xaxis.set_major_formatter(lambda k, _: f"{k:,.0f}")  # powers of ten need mathtext
            ax.xaxis.set_minor_formatter("")
        else:
            ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
        ax.set_xlim(1, longest)
        ax.set_ylim(0, 102)
        ax.grid(True)
        ax.set_xlabel(f"leading {components}")
        ax.set_ylabel("% of Σ |share|")
        if many:
            _order_bar(ax, list(scores), order)
        elif len(scores) > 1:
            ax.legend(loc="lower right")
        write_caption(ax, caption, own)
    return ax


def _halves(ax: Any, percent: Any) -> None:
    """Say how many components hold a half and nine tenths."""
    for level in (50, 90):
        k = int(np.searchsorted(percent, level)) + 1
        if k <= len(percent):
            ax.plot(k, percent[k - 1], "o", color=SERIES[0], markersize=3.5)
            ax.annotate(
                f"{k:,} {'holds' if k == 1 else 'hold'} {level} %",
                (k, percent[k - 1]),
                xytext=(5, -9),
                textcoords="offset points",
                fontsize=6.5,
            )


def _in_order(count: int) -> list[Any]:
    from matplotlib import colormaps  # pyright: ignore[reportMissingImports] (the extra `plot`)

    return list(colormaps["cividis"](np.linspace(0, 0.9, count)))


def _order_bar(ax: Any, names: Sequence[str], order: str) -> None:
    from matplotlib.cm import ScalarMappable  # pyright: ignore[reportMissingImports] (the extra `plot`)
    from matplotlib.colors import ListedColormap  # pyright: ignore[reportMissingImports] (the extra `plot`)

    bar = colour_bar(ax, ScalarMappable(cmap=ListedColormap(_in_order(len(names)))))
    bar.set_ticks([0.5 / len(names), 1 - 0.5 / len(names)], labels=[names[0], names[-1]])
    bar.set_label(order)
