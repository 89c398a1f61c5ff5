"""Peak memory of one provider: ``python -m bench.memory.provider MODEL COMPONENTS N PROVIDER [THREADS]``.

It prints, in bytes, the high-water mark of the resident set during one call less the resident set just before it. By
then the model is built, and a call with a short prompt has made the thread pools and GEMM buffers.
"""

from __future__ import annotations

import sys

import torch

from ..baselines.providers import PROVIDERS, SinglePrompt, provider
from ..core.models import random_prompt
from ..core.peak import fresh_process, measured


def peak_bytes(work: SinglePrompt, name: str, threads: int) -> int | None:
    """The peak of one provider in a fresh process; None where the system cannot tell."""
    return fresh_process("bench.memory.provider", work.model, work.components, work.length, name, threads)


def main(arguments: list[str]) -> None:
    model_name, components, length, name, *threads = arguments
    if name not in PROVIDERS:
        raise SystemExit(f"provider: {name!r} is not one of {', '.join(PROVIDERS)}.")
    torch.set_num_threads(int(threads[0]) if threads else 2)
    work = SinglePrompt(model_name, components, int(length))
    model, ids = work.build()
    short = SinglePrompt(model_name, "tokens", 4)
    provider(name, short, model, random_prompt(work.shape, 4))()
    call = provider(name, work, model, ids)
    print(measured(call))


if __name__ == "__main__":
    main(sys.argv[1:])
