"""Prompts per second: a list as one jagged batch against one prompt after the other. ``python -m bench.speed.prompts``.

Prompts have 8 to 40 random tokens. Both ways are verified to give the same scores before they are timed, in turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from depass_fast import ComponentKind, DePass, Heads, Neurons, Tokens
from depass_fast.demo import load_demo

from ..core.cli import command, writable
from ..core.models import SHAPES, Model, build_model
from ..core.results import environment, write_results
from ..core.timing import interleaved, quantiles

SHORTEST, LONGEST = 8, 40
TOLERANCE = 1e-4  # between the two ways, of the largest score
ONE_BY_ONE, BATCH = "one by one", "one jagged batch"


@dataclass(frozen=True)
class PromptList:
    """``prompts`` prompts and a kind of component, of the demo or of one of core.models.SHAPES."""

    model: str
    components: str  # tokens, heads, neurons
    prompts: int = 64
    layer: int = 0

    @property
    def kind(self) -> ComponentKind:
        return {"tokens": Tokens, "heads": Heads, "neurons": Neurons}[self.components](self.layer)

    @property
    def name(self) -> str:
        return f"{self.components} of layer {self.layer}"

    def build(self, device: str) -> tuple[Model, list[Tensor]]:
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
        model: Model = load_demo()[0] if self.model == "demo" else build_model(SHAPES[self.model], dtype, device=device)
        model = model.to(device)
        return model, random_prompts(model.config.vocab_size, self.prompts)


# where a state of 64 prompts would take gigabytes, there are fewer prompts and fewer layers to pass
FULL = [
    PromptList("demo", "tokens"),
    PromptList("demo", "heads"),
    PromptList("demo", "neurons"),
    PromptList("llama-512", "tokens"),
    PromptList("llama-512", "heads"),
    PromptList("llama-512", "neurons", prompts=16, layer=4),
]
TINY = [PromptList("llama-tiny", components, prompts=4) for components in ("tokens", "heads", "neurons")]


@dataclass
class PromptRate:
    """Prompts per second; times are of all prompts together."""

    workload: str
    model: str
    provider: str
    prompts: int
    tokens: int
    prompts_per_s: float
    median_s: float
    p20_s: float
    p80_s: float
    runs: int
    max_error: float  # between the two ways, of the largest score
    environment: dict = field(default_factory=dict)

    def as_dict(self) -> dict:
        return asdict(self)


def random_prompts(vocabulary: int, count: int, seed: int = 0) -> list[Tensor]:
    """Random ids; all lengths from SHORTEST to LONGEST are equally likely."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, vocabulary, (length,), generator=generator) for length in lengths]


def measure(work: PromptList, runs: int, device: str = "cpu") -> Iterator[PromptRate]:
    """Time both ways.

    Raises:
        RuntimeError: their scores differ; nothing is timed then.
    """
    model, prompts = work.build(device)
    library, kind = DePass(model), work.kind

    def one_by_one() -> list[Tensor]:
        return [library.attribute(prompt, kind).scores for prompt in prompts]

    def batch() -> list[Tensor]:
        return [result.scores for result in library.attribute(prompts, kind)]

    ways: dict[str, Callable[[], list[Tensor]]] = {ONE_BY_ONE: one_by_one, BATCH: batch}
    expected, scores = one_by_one(), batch()
    error = max(float((a - b).abs().max() / a.abs().max()) for a, b in zip(expected, scores, strict=True))
    if not error <= (TOLERANCE if model.dtype == torch.float32 else 0.1):
        raise RuntimeError(f"{work.name}: a batch and single prompts differ by {error:.1e}; nothing is timed.")
    del expected, scores
    for name, seconds in interleaved(ways, runs, warmup=0).items():
        time_of = quantiles(seconds)
        yield PromptRate(
            workload=work.name,
            model=work.model,
            provider=name,
            prompts=len(prompts),
            tokens=sum(map(len, prompts)),
            prompts_per_s=len(prompts) / time_of["median_s"],
            **time_of,
            max_error=error,
            environment=environment(torch.device(device).type),
        )


def main(arguments: list[str] | None = None) -> None:
    parser = command("bench.speed.prompts", __doc__)
    parser.add_argument("--out", type=writable, help="write the rows to this JSON file, after every workload")
    parser.add_argument("--tiny", "--quick", action="store_true", help="a tiny model and four prompts")
    parser.add_argument("--runs", type=int, help="timed runs of either way (default: 5; 2 with --tiny)")
    parser.add_argument("--only", help="workloads whose model or name contains this")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows: list[PromptRate] = []
    for work in TINY if options.tiny else FULL:
        if options.only and options.only not in f"{work.model} {work.name}":
            continue
        new = list(measure(work, options.runs or (2 if options.tiny else 5), options.device))
        rows += new
        for row in new:
            print(
                f"{row.model:11} {row.workload:18} {row.prompts} prompts, {row.tokens} tokens, {row.provider:16} "
                f"{row.prompts_per_s:8.1f} prompts/s  {row.median_s:.4f} s [{row.p20_s:.4f}, {row.p80_s:.4f}]",
                flush=True,
            )
        if options.out:
            write_results(options.out, "prompts", rows, device=options.device)


if __name__ == "__main__":
    main()
