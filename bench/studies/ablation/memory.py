"""Peak memory of one method of the race, in a process of its own.

``python -m bench.studies.ablation.memory MODEL LAYERS LENGTH METHOD BATCH THREADS DEVICE``, where LAYERS is `all` or
`one`. It is measured as :mod:`bench.core.peak` says.
"""

from __future__ import annotations

import sys

import torch

from ...baselines.fair_ablation import FairAblation
from ...baselines.neuron_methods import ONE_BY_ONE, methods
from ...core.peak import fresh_process, measured
from .subject import NeuronRace


def peak_bytes(work: NeuronRace, method: str, batch: int, threads: int, device: str) -> int | None:
    """The peak of one method in a fresh process; None where the system cannot tell."""
    layers = "all" if work.all_layers else "one"
    arguments = [work.model, layers, work.length, method, batch, threads, device]
    return fresh_process("bench.studies.ablation.memory", *arguments)


def main(arguments: list[str]) -> None:
    model, layers, length, name, batch, threads, device = arguments
    torch.set_num_threads(int(threads))
    subject = NeuronRace(model, layers == "all", int(length)).build(device)
    method = methods()[name](subject.model)
    if isinstance(method, FairAblation):
        method.batch = int(batch)
    some = {"neurons": range(4)} if name == ONE_BY_ONE else {}  # each takes the same memory
    zero, last = subject.zero, subject.model.config.num_hidden_layers - 1
    method.effects(subject.ids[:4], subject.target, [last], zero, **some)  # thread pools and GEMM buffers
    print(measured(lambda: method.effects(subject.ids, subject.target, subject.layers, zero, **some), device))


if __name__ == "__main__":
    main(sys.argv[1:])
