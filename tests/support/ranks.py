"""Processes that are the ranks of a gloo group. They are forked: whatever the tests have loaded is there already."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

CAN_FORK = hasattr(os, "fork") and dist.is_available()
_SECONDS = 120  # after which ranks are given up


def in_ranks(size: int, folder: Path, work: Callable[[int], Any]) -> list[Any]:
    """Return what ``work`` returns, called with its rank, in each of ``size`` processes.

    Raises:
        AssertionError: a rank fails, with its traceback; the others are ended.
    """
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_be, args=(rank, size, folder, work), daemon=True) for rank in range(size)]
    for process in ranks:
        process.start()
    until = time.monotonic() + _SECONDS
    while any(process.is_alive() for process in ranks) and time.monotonic() < until:
        if any(process.exitcode for process in ranks):
            time.sleep(0.5)  # for the others' own errors
            break
        time.sleep(0.02)
    for process in ranks:
        process.terminate()
        process.join()
    said = [path.read_text() for path in sorted(folder.glob("error-*"))]
    assert all(process.exitcode == 0 for process in ranks), "\n".join(said) or "the ranks wait for each other"
    return [torch.load(folder / f"found-{rank}", weights_only=False) for rank in range(size)]


def _be(rank: int, size: int, folder: Path, work: Callable[[int], Any]) -> None:
    """Be a rank, and end without what pytest does at the end of a process."""
    code = 1
    try:
        torch.set_num_threads(1)
        group = {"rank": rank, "world_size": size, "timeout": timedelta(seconds=_SECONDS)}
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", **group)
        torch.save(work(rank), folder / f"found-{rank}")
        dist.barrier()
        dist.destroy_process_group()
        code = 0
    except BaseException:
        (folder / f"error-{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
    os._exit(code)


@contextmanager
def reductions():
    """Collect the bytes of every reduction that this process takes part in."""
    sizes, reduce = [], dist.all_reduce

    def counted(tensor, *more, **given):
        sizes.append(tensor.numel() * tensor.element_size())
        return reduce(tensor, *more, **given)

    dist.all_reduce = counted
    try:
        yield sizes
    finally:
        dist.all_reduce = reduce
