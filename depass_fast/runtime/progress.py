"""Progress bars for work of more than two seconds. They appear on stderr if it is a terminal, and vanish when done.

The forward pass has a bar of the model's layers, a propagation one of the layers that it passes, an adjoint sweep one
of prompts, generation one of tokens. A step within a unit reports its progress through :func:`advance`. Every thread
has a bar of its own; one of them is shown at a time.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress

_DELAY = 2.0  # seconds before a bar appears
_PAUSE = 0.1  # seconds between two drawings

_here = threading.local()
_terminal = threading.Lock()  # held by the bar that is shown


class ProgressBar:
    """The progress of ``total`` units of work, drawn by rich once it takes long."""

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.done = label, total, 0
        self._next_time = time.monotonic() + _DELAY
        self._drawn: Progress | None = None

    def finish(self) -> None:
        """Count one unit as done."""
        self.done += 1
        self.draw(0.0)

    def draw(self, part: float) -> None:
        """Draw the bar, with a ``part`` (0 to 1) of the present unit done, unless it was drawn a moment ago."""
        now = time.monotonic()
        if now < self._next_time:
            return
        self._next_time = now + _PAUSE
        if self._drawn is None and _terminal.acquire(blocking=False):
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
            self._drawn = Progress(*columns, console=Console(file=sys.stderr), transient=True, auto_refresh=False)
            self._drawn.start()
            self._drawn.add_task(self.label, total=self.total)
        if self._drawn is not None:
            task = self._drawn.task_ids[0]
            self._drawn.update(task, description=self.label, completed=self.done + part, refresh=True)

    def close(self) -> None:
        """Remove the bar."""
        if self._drawn is not None:
            self._drawn.stop()
            _terminal.release()


@contextmanager
def progress_bar(label: str, total: int, wanted: bool = True) -> Iterator[ProgressBar | None]:
    """A bar of ``total`` units; None if it is not wanted, stderr is no terminal, or this thread has a bar already."""
    outer = getattr(_here, "bar", None)
    if not wanted or total < 1 or outer is not None or sys.stderr is None or not sys.stderr.isatty():
        yield None
        return
    _here.bar = bar = ProgressBar(label, total)
    try:
        yield bar
    finally:
        _here.bar = None
        bar.close()


@contextmanager
def progress_bar_of_calls(label: str, modules: Iterable[Any], passes: int, wanted: bool) -> Iterator[None]:
    """A bar of ``passes`` through ``modules``. Whenever this thread has called one of them, one unit is done."""
    modules, thread = list(modules), threading.get_ident()
    with progress_bar(label, passes * len(modules), wanted) as bar, ExitStack() as undo:

        def finish_unit(*_: Any) -> None:
            if bar is not None and threading.get_ident() == thread:  # other threads may use the model, too
                bar.finish()

        for module in modules if bar is not None else ():
            undo.callback(module.register_forward_hook(finish_unit).remove)
        yield


def advance(part: float) -> None:
    """Report how much of the present unit of this thread's bar is done, 0 to 1."""
    bar = getattr(_here, "bar", None)
    if bar is not None:
        bar.draw(min(part, 1.0))


class Parts:
    """A division of the present unit of this thread's bar into ``total`` equal parts."""

    def __init__(self, total: float) -> None:
        self._total, self._done = max(1.0, total), 0.0

    def finish(self, part: float = 1.0) -> None:
        """Count one part, or a fraction ``part`` of one, as done."""
        self._done += part
        advance(self._done / self._total)
