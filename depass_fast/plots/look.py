"""The look of all pictures: colours, sizes and lines, set for the time of a drawing and put back.

The colours of signed scores go from white at zero to orange (positive) and to blue (negative), told apart by
colour-blind eyes of every kind. Each arm was made in CIELAB with a lightness that falls linearly, from 97.5 to 40, so
that a score of either sign is as dark as it is large, in a grey print, too. There the sign is a mark
(:func:`depass_fast.plots.heat.heat`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from ..runtime.extras import needed

POSITIVE, NEGATIVE, OTHERS = "#d36003", "#0073c0", "#9a9a9a"
WARNING = "#a3142c"

# lines that stand for methods, studies or layers; told apart by colour-blind eyes, and by their styles in grey
SERIES = ("#0073c0", "#d36003", "#3a7d44", "#7b4b94", "#b8860b", "#4a4a4a", "#d1689d", "#2aa198")
STYLES = ("-", "--", ":", "-.")

WIDTHS = {"column": 3.3, "page": 6.8}  # inches, of one column and of both in most two-column papers

_ARMS = (
    ("#0060a7", "#0073c0", "#0087da", "#349aea", "#69aded", "#90c0f0", "#b3d3f2", "#d6e5f5"),
    ("#f6dfcd", "#f2c7a5", "#ecae7e", "#e59559", "#dd7c34", "#d36003", "#bd4e00", "#a53d00"),
)
_ZERO = "#f8f8f8"

_LOOK: Any = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.2,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "text.parse_math": False,  # a token may be a dollar sign
    "text.usetex": False,
}


def needs_matplotlib() -> None:
    """Raise ImportError where matplotlib is not installed; the message names the extra `plot`."""
    needed("matplotlib", "plot", "plot")


@contextlib.contextmanager
def paper() -> Iterator[None]:
    """Draw with the sizes and lines of these pictures; matplotlib's own settings are put back at the end.

    Fonts are the user's own ``font.family``.

    Raises:
        ImportError: matplotlib is not installed.
    """
    needs_matplotlib()
    import matplotlib  # pyright: ignore[reportMissingImports] (the extra `plot`)

    with matplotlib.rc_context(_LOOK):
        try:
            yield
        finally:
            interactive = matplotlib.is_interactive()
    matplotlib.interactive(interactive)  # which a notebook's backend switches on when the first figure loads it


@lru_cache(maxsize=1)
def signed_colours() -> Any:
    """Return the diverging colour map of signed scores, a matplotlib `Colormap`: blue, white at its middle, orange."""
    from matplotlib.colors import LinearSegmentedColormap  # pyright: ignore[reportMissingImports] (the extra `plot`)

    made = LinearSegmentedColormap.from_list("depass_signed", [*_ARMS[0], _ZERO, *_ARMS[1]], N=511)
    return made.with_extremes(bad=(0, 0, 0, 0))


def centred(limit: float) -> Any:
    """Return a matplotlib norm from -``limit`` to ``limit``, so that zero is the middle of the colours."""
    from matplotlib.colors import Normalize  # pyright: ignore[reportMissingImports] (the extra `plot`)

    limit = limit if limit > 0 else 1.0
    return Normalize(-limit, limit)


def colours_of(cmap: Any) -> Any:
    """Return a matplotlib `Colormap`: the one given or named; None is :func:`signed_colours`.

    Raises:
        ValueError: matplotlib knows no map of this name.
        TypeError: it is neither a name nor a map.
    """
    from matplotlib import colormaps  # pyright: ignore[reportMissingImports] (the extra `plot`)

    if cmap is None:
        return signed_colours()
    if isinstance(cmap, str) and cmap not in colormaps:
        raise ValueError(f"cmap: {cmap!r} is not the name of a colour map that matplotlib knows.")
    return colormaps.get_cmap(cmap)


def checked_limit(limit: float | None) -> float | None:
    """Return the score at which colours are full. Raises ValueError where it is not a positive number."""
    if limit is not None and (isinstance(limit, bool) or not 0 < limit < float("inf")):
        raise ValueError(f"limit: {limit!r} is out of range; it must be a positive number.")
    return limit


def sign_colour(value: float) -> str:
    """Return the colour of a bar."""
    return POSITIVE if value >= 0 else NEGATIVE


def inches(width: str | float | None, default: str = "column") -> float:
    """Return a width in inches: that of one "column" or of a "page", or the number given; None is the ``default``.

    Raises:
        ValueError: it is another word, or not positive.
    """
    width = default if width is None else width
    if isinstance(width, str):
        if width not in WIDTHS:
            raise ValueError(f"width: {width!r} is not one of {', '.join(map(repr, WIDTHS))}, nor a number of inches.")
        return WIDTHS[width]
    if isinstance(width, bool) or not 0 < width < float("inf"):
        raise ValueError(f"width: {width!r} is out of range; a width is a positive number of inches.")
    return float(width)
