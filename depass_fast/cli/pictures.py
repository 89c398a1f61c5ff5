"""--plot of the commands: a picture per result."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import types
from .output import note, on_stderr


def add_plot(group: argparse._ActionsContainer, what: str) -> None:
    """Add --plot; ``what`` says what the picture shows."""
    group.add_argument(
        "--plot",
        type=types.picture,
        metavar="FILE",
        help=f"draw {what} into FILE.svg, FILE.pdf or FILE.png; for several prompts or positions FILE-0.svg, ... "
        "Needs the extra plot",
    )


class Pictures:
    """Draws results into --plot as they come, numbered from 0 where there are several; ``path`` None draws nothing.

    Raises:
        ImportError: matplotlib is not installed.
    """

    def __init__(self, path: Path | None, numbered: bool) -> None:
        self.path, self.numbered, self.count = path, numbered, 0
        if path is not None:
            from ..plots import needs_matplotlib

            needs_matplotlib()
            import matplotlib  # pyright: ignore[reportMissingImports] (the extra `plot`)

            matplotlib.use("agg")  # a command opens no window

    def add(self, draw: Callable[[], Any]) -> None:
        """Write the picture that ``draw`` returns, Axes or a Figure."""
        if self.path is None:
            return
        from matplotlib import pyplot  # pyright: ignore[reportMissingImports] (the extra `plot`)

        from ..plots import save

        path = self.path
        if self.numbered:
            path = path.with_name(f"{path.stem}-{self.count}{path.suffix}")
        with on_stderr():
            save(draw(), path)
        pyplot.close("all")
        note(f"wrote {path}")
        self.count += 1
