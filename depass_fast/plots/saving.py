"""Pictures as files: the text of PDF, PostScript and SVG files stays text, and the same picture gives the same file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..runtime.paths import check_path
from .look import needs_matplotlib

SUFFIXES = (".png", ".svg", ".pdf")
_DPI = 300  # of a PNG file

_AS_TEXT: Any = {"pdf.fonttype": 42, "ps.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "depass_fast"}
_NO_DATE: dict[str, dict[str, None]] = {".svg": {"Date": None, "Creator": None}, ".pdf": {"CreationDate": None}}


def save(picture: Any, path: str | Path, **savefig: Any) -> None:
    """Write a picture, the Axes that ``plot`` returns or a Figure, as PNG, SVG, PDF or what else matplotlib writes.

    matplotlib reads its settings when it saves. Here PDF files hold TrueType fonts and SVG files text, which stay text
    for who edits and searches them, and files hold no date. ``savefig`` are more arguments of `Figure.savefig`; a PNG
    has 300 dots per inch.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: there is no such folder (FileNotFoundError), or the file cannot be written.
    """
    check_path(path)
    needs_matplotlib()
    import matplotlib  # pyright: ignore[reportMissingImports] (the extra `plot`)

    path = Path(path)
    figure = picture.figure.figure if hasattr(picture, "figure") else picture  # that of a subfigure is the whole
    options: dict[str, Any] = {"dpi": _DPI, "metadata": _NO_DATE.get(path.suffix.lower())}
    with matplotlib.rc_context(_AS_TEXT):
        figure.savefig(path, **options | savefig)
