"""Progress bars on whatever takes more than two seconds: on a terminal only, on stderr, gone when done.

The forward pass opens a bar for the model's layers, the engine for those that it carries components through, adjoint
sweeps for prompts, generation for tokens; a step within one says how far it has come, through :func:`advance`. Every
thread has a bar of its own, of which one at a time is shown.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

_DELAY = 2.0  # seconds before a bar appears
_PAUSE = 0.1  # seconds between two drawings

_here = threading.local()
_terminal = threading.Lock()  # held by the bar that is shown


class ProgressBar:
    """``total`` units of work, of which some are done; drawn by rich once it takes long."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.done, self.steps = label, total, 0.0, 1
        self._next, self._shown = time.monotonic() + _DELAY, None

    def finish(self) -> None:
        """One unit is done."""
        self.done = int(self.done) + 1
        self.draw(0.0)

    def draw(self, part: float) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _PAUSE
        if self._shown is None and _terminal.acquire(blocking=False):
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            self._shown = Progress(*columns, console=Console(file=sys.stderr), transient=True, auto_refresh=False)
            self._shown.start()
            self._shown.add_task(self.label, total=self.total)
        if self._shown is not None:
            self._shown.update(self._shown.task_ids[0], completed=self.done + part, refresh=True)

    def close(self) -> None:
        if self._shown is not None:
            self._shown.stop()
            _terminal.release()


@contextmanager
def progress_bar(label: str, total: int, wanted: bool = True) -> Iterator[ProgressBar | None]:
    """A bar of ``total`` units; None, and nothing is ever drawn, where it is not wanted or stderr is no terminal."""
    outer = getattr(_here, "bar", None)
    if not wanted or total < 1 or outer is not None or not sys.stderr.isatty():
        yield None
        return
    _here.bar = made = ProgressBar(label, total)
    try:
        yield made
    finally:
        _here.bar = None
        made.close()


@contextmanager
def progress_bar_of_calls(label: str, modules: Iterable[Any], passes: int, wanted: bool) -> Iterator[None]:
    """A bar of so many ``passes`` through ``modules``: a unit is done whenever this thread has called one of them."""
    modules, thread = list(modules), threading.get_ident()
    with progress_bar(label, passes * len(modules), wanted) as shown, ExitStack() as undo:

        def done(*_: Any) -> None:
            if threading.get_ident() == thread:  # others may use the model, too
                shown.finish()

        for module in modules if shown is not None else ():
            undo.callback(module.register_forward_hook(done).remove)
        yield


def advance(part: float) -> None:
    """Say how much of the present unit of this thread's bar is done, 0 to 1."""
    shown = getattr(_here, "bar", None)
    if shown is not None:
        shown.draw(min(part, 1.0))


class Parts:
    """Equal parts that the present unit of this thread's bar consists of, done one after the other."""

    def __init__(self, total: float) -> None:
        self._total, self._done = max(1.0, total), 0.0

    def finish(self, part: float = 1.0) -> None:
        """One is done, or a part of one."""
        self._done += part
        advance(self._done / self._total)
