"""Lanes: pieces of work that are independent take turns on streams of a GPU.

A product keeps the tensor cores busy and reading rows keeps the memory busy. On one stream each waits for the other; on
two streams one piece's product runs beside another piece's reading.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

Work = TypeVar("Work")


@functools.cache
def _streams(device: torch.device, count: int) -> tuple[torch.cuda.Stream, ...]:
    return tuple(torch.cuda.Stream(device) for _ in range(count))


class Lanes:
    """``count`` lanes on ``device``; with one, or on a CPU, work is done where the caller is.

    What the caller has launched is done before any lane begins, and all lanes are done before the caller goes on.
    """

    def __init__(self, device: torch.device, count: int) -> None:
        self.streams = _streams(device, count) if device.type == "cuda" and count > 1 else ()
        self._device, self._turn = device, 0

    @contextmanager
    def open(self) -> Iterator[None]:
        """Let lanes run inside; at the end wait for them, whatever happens. Nothing here waits on the host."""
        try:
            yield
        finally:
            for stream in self.streams:
                torch.cuda.current_stream(self._device).wait_stream(stream)

    def run(self, step: Callable[[Work, int], None], work: Work) -> None:
        """Do ``step`` with a piece of work and the lane's number."""
        if not self.streams:
            step(work, 0)
            return
        lane = self._turn % len(self.streams)
        stream = self.streams[lane]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            step(work, lane)
        self._turn += 1
