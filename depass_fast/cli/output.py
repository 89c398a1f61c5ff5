"""All that the command line prints: results on standard output, everything else on standard error."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..results.attribution import Attribution
    from ..results.continuation import Continuation
    from ..results.generation import Generation
    from ..results.layered import LayeredAttribution

    Result = Attribution | LayeredAttribution | Continuation | Generation


def emit(text: Any) -> None:
    """Print a result, or a part of one, on standard output."""
    print(text, flush=True)


def note(text: str) -> None:
    """Print what is not the result on standard error."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def on_stderr() -> Iterator[None]:
    """Send to standard error what libraries print, warnings, and the log of this one (the backend chosen, and why)."""
    logger, handler = logging.getLogger("depass_fast"), logging.StreamHandler(sys.stderr)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.showwarning = _show_warning
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning on a line, without the line of Python that it came from."""
    note(f"depass-fast: warning: {' '.join(str(message).split())}")


def show(result: Result, *, as_json: bool, top: int | None = None) -> None:
    """Print a result: one line of JSON, or text, which is in colour on a terminal."""
    if as_json:
        emit(json.dumps(result.to_dict(), allow_nan=False))
        return
    from rich.console import Console

    from ..results.attribution import Attribution
    from ..results.layered import LayeredAttribution
    from ..results.render import plain, rich_view

    console = Console()
    if not isinstance(result, (Attribution, LayeredAttribution)):
        emit(result)
    elif console.is_terminal:
        console.print(rich_view(result, top))
    else:
        emit(plain(result, top))


class Writer:
    """Writes results to --out as they come: lines of JSON into one file, or a file of scores for each.

    FILE.jsonl is FILE.jsonl.part until :meth:`close`. Of several results, FILE.csv and FILE.safetensors get the number
    of the prompt, from 0: FILE-0.csv. ``path`` None writes nothing.
    """

    def __init__(self, path: Path | None, numbered: bool) -> None:
        self.path, self.numbered, self.count = path, numbered, 0
        self._part = None if path is None or path.suffix != ".jsonl" else path.with_name(path.name + ".part")
        if self._part is not None:
            self._part.write_bytes(b"")

    def write(self, result: Result) -> None:
        """Write one result."""
        if self._part is not None:
            with open(self._part, "a", encoding="utf-8") as file:
                file.write(json.dumps(result.to_dict(), allow_nan=False) + "\n")
        elif self.path is not None:
            path = self.path
            if self.numbered:
                path = path.with_name(f"{path.stem}-{self.count}{path.suffix}")
            _write(result, path)
            note(f"wrote {path}")
        self.count += 1

    def close(self) -> None:
        """Say that all results were written."""
        if self._part is not None and self.path is not None:
            os.replace(self._part, self.path)
            note(f"wrote {self.path}")


def _write(result: Result, path: Path) -> None:
    (result.save if path.suffix == ".safetensors" else result.to_csv)(path)
