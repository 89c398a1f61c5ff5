"""Many prompts at once against one by one: ``python -m bench.prompts [--out FILE.json] [--quick]``.

A batch of prompts of different lengths goes through the library as one jagged batch, without padding. It is verified
that the scores are those of the prompts one by one; then both are timed, interleaved.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from depass_fast import ComponentKind, DePass, Heads, Neurons, Tokens

from .harness import SHAPES, Row, Shape, build_model, environment, interleaved, quantiles, write_results

KINDS: dict[str, ComponentKind] = {"tokens": Tokens(), "heads": Heads(0), "neurons": Neurons(0)}
TARGET, TOLERANCE = 7, 1e-4


def lengths(count: int, shortest: int, longest: int) -> list[int]:
    """Lengths of prompts, all in the range, in no order."""
    return torch.randint(shortest, longest + 1, (count,), generator=torch.Generator().manual_seed(0)).tolist()


def measure(shape: Shape, name: str, sizes: list[int], runs: int) -> list[Row]:
    """A row for the batch, a row for one by one; times are those of all prompts."""
    dp, kind = DePass(build_model(shape), progress=False), KINDS[name]
    make = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, shape.vocabulary, (n,), generator=make) for n in sizes]

    def together() -> list:
        return dp.attribute(prompts, kind, TARGET)

    def alone() -> list:
        return [dp.attribute(prompt, kind, TARGET) for prompt in prompts]

    error = max(
        float((a.scores - b.scores).abs().max() / b.scores.abs().max())
        for a, b in zip(together(), alone(), strict=True)
    )
    if not error <= TOLERANCE:
        raise RuntimeError(f"{name}: a batch differs from its prompts one by one by {error:.1e}; nothing is timed.")
    seconds = interleaved({"jagged batch": together, "one by one": alone}, runs, warmup=0)
    workload = f"{name}, {len(sizes)} prompts of {min(sizes)} to {max(sizes)} tokens"
    common = {"workload": workload, "model": shape.name, "dtype": "float32", "environment": environment()}
    absent = dict.fromkeys(("gflops", "gemm_fraction", "gemm_gflops", "peak_bytes"))
    return [
        Row(
            provider=provider,
            **quantiles(taken),
            **common,
            **absent,
            max_error=error,
            compared_with=other,
            verified=True,
        )
        for (provider, taken), other in zip(seconds.items(), ("one by one", "jagged batch"), strict=True)
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.prompts", description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="a few prompts and a tiny model, in seconds")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args(arguments)
    shape = SHAPES["llama-tiny" if options.quick else "llama-512"]
    sizes = {
        "tokens": lengths(*((6, 3, 9) if options.quick else (64, 8, 48))),
        "heads": lengths(*((6, 3, 9) if options.quick else (64, 8, 48))),
        "neurons": lengths(*((4, 3, 6) if options.quick else (8, 4, 12))),
    }
    rows: list[Row] = []
    for name, of in sizes.items():
        rows += measure(shape, name, of, 1 if options.quick else options.runs)
        batch, single = (len(of) / row.median_s for row in rows[-2:])
        print(f"{rows[-1].workload}: {batch:.1f} prompts/s, one by one {single:.1f}: {batch / single:.2f}×", flush=True)
    if options.out is not None:
        write_results(options.out, "cpu", rows)


if __name__ == "__main__":
    main()
