"""Pictures for papers, drawn with matplotlib: the look, saving, and the shapes that results are drawn in.

Results have a method ``plot`` (docs/plots.md). This room knows no result: it draws bars, tables, curves and tokens.
"""

from .look import NEGATIVE, POSITIVE, SERIES, WIDTHS, needs_matplotlib, paper, signed_colours
from .places import plot_positions
from .saving import save

__all__ = [
    "NEGATIVE",
    "POSITIVE",
    "SERIES",
    "WIDTHS",
    "needs_matplotlib",
    "paper",
    "plot_positions",
    "save",
    "signed_colours",
]
