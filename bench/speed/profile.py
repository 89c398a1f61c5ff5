"""The operators that take the time of a workload: ``python -m bench.speed.profile [tokens|neurons] [N]``.

It prints torch's operators, without the forward pass, sorted by their own time.
"""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile

from ..baselines.providers import PROVIDERS, SinglePrompt, provider
from ..core.cli import command
from ..core.models import SHAPES
from ..core.timing import Gemm, interleaved


def main(arguments: list[str] | None = None) -> None:
    parser = command("bench.speed.profile", __doc__)
    parser.add_argument("components", nargs="?", choices=("tokens", "neurons"), default="tokens")
    parser.add_argument("length", nargs="?", type=int, default=128)
    parser.add_argument("--model", choices=tuple(SHAPES), default="llama-512")
    parser.add_argument("--provider", choices=PROVIDERS, default="depass_fast/trace")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--top", type=int, default=20)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    work = SinglePrompt(options.model, options.components, options.length)
    call = provider(options.provider, work, *work.build())
    gemm = Gemm(work.shape, work.rows)
    seconds = interleaved({"call": call, "gemm": gemm}, runs=3)
    best, rate = float(seconds["call"].min()), gemm.rate(seconds["gemm"].min(keepdims=True))
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        call()
    print(recorded.key_averages().table("self_cpu_time_total", row_limit=options.top))
    floor = work.flops / rate / 1e9
    print(f"{work.name}: best of 3 {best:.3f} s; floor at the measured GEMM rate ({rate:.0f} GFLOP/s) {floor:.3f} s")


if __name__ == "__main__":
    main()
