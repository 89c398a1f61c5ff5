"""All that the command line prints: results on standard output, everything else on standard error."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import is_users, one_line, with_flags

if TYPE_CHECKING:
    from ..results.attribution import Attribution
    from ..results.continuation import Continuation
    from ..results.generation import Generation
    from ..results.layered import LayeredAttribution

    Result = Attribution | LayeredAttribution | Continuation | Generation


def emit(text: Any) -> None:
    """Print a result, or a part of one, on standard output.

    Raises:
        OSError: the reader of a pipe has gone, or a disk is full. What is printed from then on is dropped.
    """
    try:
        print(text, flush=True)
    except OSError:
        drop_output()
        raise


def drop_output() -> None:
    """Let standard output lead nowhere, so that what is still in its buffer raises no error at the end."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # a stream in memory, or none
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def note(text: str) -> None:
    """Print what is not the result on standard error, if that can be written to."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
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


@contextlib.contextmanager
def saying_once() -> Iterator[None]:
    """Leave out the warnings that a printed result holds itself."""
    from ..results.completeness import CompletenessWarning
    from ..results.estimate import ApproximationWarning
    from ..results.verification import VerificationWarning

    with warnings.catch_warnings():
        for category in (ApproximationWarning, CompletenessWarning, VerificationWarning):
            warnings.simplefilter("ignore", category)
        yield


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning on a line, without the line of Python that it came from."""
    note(f"depass-fast: warning: {with_flags(' '.join(str(message).split()))}")


def show(result: Result, *, as_json: bool, top: int | None = None) -> None:
    """Print a result: one line of JSON, or text, which is in colour on a terminal."""
    if as_json:
        emit(json.dumps(result.to_dict(), allow_nan=False))
        return
    from ..results.attribution import Attribution
    from ..results.layered import LayeredAttribution
    from ..results.render import plain, rich_view

    result = _advising_flags(result)
    if not isinstance(result, (Attribution, LayeredAttribution)):
        emit(result)
    else:
        print_view(rich_view(result, top), lambda: plain(result, top))


def print_view(view: Any, plainly: Callable[[], str] | None = None) -> None:
    """Print what rich shows in colour on a terminal, and its text elsewhere: ``plainly()``, or ``str(view)``."""
    from rich.console import Console

    console = Console()
    if console.is_terminal:
        console.print(view)
    else:
        emit(view if plainly is None else plainly())


def _advising_flags(result: Any) -> Any:
    """The result, or a copy of it whose warnings advise flags."""
    if not result.warnings:
        return result
    shown = copy.copy(result)
    if hasattr(result, "shares"):
        shown.shares = _advising_flags(result.shares)
    else:
        shown.warnings = [with_flags(text) for text in result.warnings]
    return shown


class Writer:
    """Writes results to --out as they come: lines of JSON into one file, or a file of scores for each.

    FILE.jsonl is FILE.jsonl.part until :meth:`close`. Of several results, FILE.csv and FILE.safetensors get the number
    of each, from 0: FILE-0.csv. ``path`` None writes nothing.
    """

    def __init__(self, path: Path | None, numbered: bool) -> None:
        self.path, self.numbered, self.count = path, numbered, 0
        self._part = None if path is None or path.suffix != ".jsonl" else path.with_name(path.name + ".part")
        if self._part is not None:
            self._part.write_bytes(b"")

    def write(self, result: Any) -> None:
        """Write one result, or a ledger: anything with the method that the file takes."""
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
        """Give FILE.jsonl its name: all results were written."""
        if self._part is not None and self.path is not None:
            os.replace(self._part, self.path)
            note(f"wrote {self.path}")


class Output:
    """Prints results, and writes them to --out, as they come. Where one of the two fails, the other goes on."""

    def __init__(self, path: Path | None, numbered: bool) -> None:
        self.writer = Writer(path, numbered)
        self._unprinted: OSError | None = None
        self._unwritten: Exception | None = None
        self._count = 0

    @property
    def is_empty(self) -> bool:
        """True before the first result."""
        return self._count == 0

    def add(self, result: Any, show: Callable[[], None]) -> None:
        """Print one result by ``show``, and write it.

        Raises:
            Exception: one of the two failed and the other had failed before, or nothing is written at all.
        """
        self._count += 1
        if self._unprinted is None:
            try:
                show()
            except OSError as error:
                if self.writer.path is None or self._unwritten is not None:
                    raise self._unwritten or error from None
                self._unprinted = error
        if self._unwritten is None:
            try:
                self.writer.write(result)
            except Exception as error:
                if not is_users(error) or self._unprinted is not None:
                    raise
                self._unwritten = error
                note(f"depass-fast: warning: --out: {one_line(error)}; the other results are printed only.")

    def close(self) -> None:
        """Finish FILE.jsonl.

        Raises:
            Exception: a result was not written, or not printed. A pipe whose reader has gone is no error.
        """
        if self._unwritten is not None:
            raise self._unwritten
        self.writer.close()
        if self._unprinted is not None and not isinstance(self._unprinted, BrokenPipeError):
            raise OSError(f"standard output: {self._unprinted}; --out holds every result.") from self._unprinted


def _write(result: Any, path: Path) -> None:
    (result.save if path.suffix == ".safetensors" else result.to_csv)(path)
