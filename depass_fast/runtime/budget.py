"""The workspace of a run in bytes, halved where memory runs out, and work that carries on from there.

A piece of work writes to the state last, all at once. So a piece that runs out of memory has written nothing: the rest
is cut smaller and done from there on, and the result is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from .log import warn_user
from .memory import is_out_of_memory, readable
from .progress import advance

_LEAST_WORKSPACE = 1 << 10
_ADVICE = (
    "what is short is room for the state and the trace. Take a state_dtype of half the size, fewer or shorter prompts, "
    "stream=True, or carry the components in several runs with focus(...)."
)

Work = TypeVar("Work")
Made = TypeVar("Made")


class Budget:
    """Bytes of workspace: ``given``, or a device's default. ``release`` lets go of everything that is held.

    With less than ``least`` nothing is tried again: the error then gives the ``advice``.
    """

    def __init__(
        self,
        given: int | None,
        default: Callable[[torch.device], int],
        release: Callable[[], None],
        least: int = _LEAST_WORKSPACE,
        advice: str = _ADVICE,
    ) -> None:
        self._bytes, self._default, self._release = given, default, release
        self._least, self._advice = least, advice

    def bytes(self, device: torch.device) -> int:
        """Return the bytes of workspace on a device by now."""
        return self._bytes or self._default(device)

    def each(
        self,
        device: torch.device,
        cut: Callable[[Work | None], Sequence[Work]],
        step: Callable[[Work], None],
    ) -> None:
        """Do ``step`` for every piece. ``cut`` gives all pieces for None, else those from an undone one on."""
        pieces = self.prepare(device, lambda: cut(None))
        done, total = 0, max(1, len(pieces))
        while done < len(pieces):
            failed = None
            try:
                step(pieces[done])
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failed = str(error)
                self.halve(device, error)
            if failed is None:
                done += 1
                advance(done / total)
            else:  # out of the handler, which holds on to what the step had allocated
                undone = pieces[done]
                total -= len(pieces)
                pieces, done = self.prepare(device, lambda undone=undone: cut(undone)), 0
                total += len(pieces)

    def prepare(self, device: torch.device, make: Callable[[], Made]) -> Made:
        """Return what ``make`` makes without writing to the state; where memory runs out, try again with less held."""
        while True:
            try:
                return make()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self.halve(device, error)

    def halve(self, device: torch.device, error: BaseException) -> None:
        """Halve the workspace, and warn. Raises OutOfMemoryError where it is as small as it can be."""
        before = self.bytes(device)
        if before // 2 < self._least:
            raise torch.OutOfMemoryError(
                f"out of memory on {device} with a workspace of {readable(before)}: {self._advice}"
            ) from error
        self._bytes = before // 2
        self._release()
        warn_user(
            f"out of memory on {device}: carrying on with a workspace of {readable(self._bytes)} instead of "
            f"{readable(before)}; results do not change. memory_budget={self._bytes} avoids the attempt.",
            RuntimeWarning,
        )
