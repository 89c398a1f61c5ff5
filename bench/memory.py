"""Peak memory of one provider, in a process of its own: ``python -m bench.memory MODEL COMPONENTS N PROVIDER``.

Printed is, in bytes, the high-water mark of the resident set during one call less the resident set just before it,
when the model is built and the thread pools and GEMM buffers exist (a call with a short prompt has been made). It is
read from ``VmHWM``, which the kernel keeps exactly and which is reset before the call: sampling could miss a peak, and
``ru_maxrss`` inherits the resident set of the process that forked this one. Linux only.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from .harness import random_prompt
from .providers import PROVIDERS, Workload, provider


def peak_bytes(work: Workload, name: str, threads: int) -> int | None:
    """The peak of one provider in a fresh process; None where the system cannot tell."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    arguments = [work.model, work.components, str(work.length), name, str(threads)]
    command = [sys.executable, "-m", "bench.memory", *arguments]
    root = Path(__file__).parent.parent
    return int(subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.split()[-1])


def _status(key: str) -> int:
    return 1024 * int(re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)[1])


def measured(call: Callable[[], object]) -> int:
    """The high-water mark of the resident set during ``call`` less the resident set just before it."""
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def main(arguments: list[str]) -> None:
    model_name, components, length, name, *threads = arguments
    if name not in PROVIDERS:
        raise SystemExit(f"provider: {name!r} is not one of {', '.join(PROVIDERS)}.")
    torch.set_num_threads(int(threads[0]) if threads else 2)
    work = Workload(model_name, components, int(length))
    model, ids = work.build()
    short = Workload(model_name, "tokens", 4)
    provider(name, short, model, random_prompt(work.shape, 4))()
    print(measured(provider(name, work, model, ids)))


if __name__ == "__main__":
    main(sys.argv[1:])
