"""Peak memory of one method of the race, in a process of its own.

``python -m bench.ablation.memory MODEL LAYERS LENGTH METHOD BATCH THREADS DEVICE``, where LAYERS is `all` or `one`. As
in :mod:`bench.memory`; on a GPU it is what the allocator held at most.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch

from ..memory import fresh_process, measured
from .methods import FAIR, ONE_BY_ONE, methods

if TYPE_CHECKING:
    from .race import Workload


def peak_bytes(work: Workload, method: str, batch: int, threads: int, device: str) -> int | None:
    """The peak of one method in a fresh process; None where the system cannot tell."""
    layers = "all" if work.all_layers else "one"
    arguments = [work.model, layers, work.length, method, batch, threads, device]
    return fresh_process("bench.ablation.memory", *arguments)


def main(arguments: list[str]) -> None:
    from .race import Workload

    model, layers, length, name, batch, threads, device = arguments
    torch.set_num_threads(int(threads))
    subject = Workload(model, layers == "all", int(length)).build(device)
    method = methods()[name](subject.model)
    if name == FAIR:
        method.batch = int(batch)
    some = {"neurons": range(4)} if name == ONE_BY_ONE else {}  # every one takes the same memory
    zero, last = subject.zero, subject.model.config.num_hidden_layers - 1
    method.effects(subject.ids[:4], subject.target, [last], zero, **some)  # thread pools and GEMM buffers
    print(measured(lambda: method.effects(subject.ids, subject.target, subject.layers, zero, **some), device))


if __name__ == "__main__":
    main(sys.argv[1:])
