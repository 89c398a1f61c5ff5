"""Ablation, attribution patching and DePass over the same neurons: ``python -m bench.studies.ablation [--out FILE]``.

Each workload is verified, then its methods are timed in turns, then their memory is measured in a process each. At
the end comes the quality: every method's numbers for all neurons of the demo model beside the measured effects.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from ...baselines.neuron_methods import methods
from ...core.cli import command, writable
from ...core.questions import demo_model, questions
from ...core.results import environment, write_results
from .quality import CORPUS, mean_activations, quality
from .race import MethodResult, measure, verify
from .scale import race
from .subject import NeuronRace

FULL = [NeuronRace(model, all_layers) for model in ("demo", "llama-512") for all_layers in (False, True)]
TINY = [NeuronRace("llama-tiny", all_layers, length=6) for all_layers in (False, True)]


def main(arguments: list[str] | None = None) -> None:
    parser = command("bench.studies.ablation", __doc__)
    parser.add_argument("--out", type=writable, help="write the rows to this JSON file, after every workload")
    parser.add_argument("--tiny", "--quick", action="store_true", help="tiny shapes and two prompts, in seconds")
    parser.add_argument("--runs", type=int, help="timed runs per method (default: 5; 2 with --tiny)")
    parser.add_argument(
        "--sample", type=int, help="neurons that are ablated one at a time (default: 48; 8 with --tiny)"
    )
    parser.add_argument("--prompts", type=int, help="prompts of the quality (default: 60; 2 with --tiny)")
    parser.add_argument("--models", nargs="+", help="demo, or names of core.models.SHAPES (default: demo llama-512)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory measurement")
    parser.add_argument(
        "--only", choices=["quality"], help="measure the quality again, and keep the race that --out holds"
    )
    parser.add_argument(
        "--scale", metavar="MODEL", help="instead: the race in the shape of this model, sampled where that is slow"
    )
    parser.add_argument("--length", type=int, default=20, help="tokens of the prompt of --scale")
    options = parser.parse_args(arguments)
    if options.scale:
        race_at_scale(options)
        return
    if options.only and not options.out:
        parser.error("--only quality keeps the race of a results file: give it as --out FILE")
    torch.set_num_threads(options.threads)
    runs = options.runs or (2 if options.tiny else 5)
    sample = options.sample or (8 if options.tiny else 48)
    count = options.prompts or (2 if options.tiny else 60)
    works = TINY if options.tiny else FULL
    if options.models:
        works = [NeuronRace(model, all_layers) for model in options.models for all_layers in (False, True)]

    if options.only:
        measure_quality_again(options.out, count, options.device)
        return

    rows: list[MethodResult] = []
    facts: dict = {"quick": options.tiny, "search": []}

    def write() -> None:
        if options.out:  # after every step: a run that is cut short keeps what it has measured
            write_results(options.out, "ablation", rows, device=options.device, **facts)

    with torch.no_grad():
        for number, work in enumerate(works):
            watched = [] if options.no_memory else list(methods())
            if options.tiny:  # a process takes seconds: one shows that it runs
                watched = watched[:1] if number == 0 else []
            measured, search = measure(work, runs, sample, options.device, watched)
            facts["search"].append({"model": work.model, "workload": work.name, **search})
            rows += measured
            print(summary(work, measured, search), flush=True)
            write()
    facts |= measure_quality(count, options.device)
    with_quality(rows, facts["quality"], facts["n_prompts"])
    write()


def race_at_scale(options: argparse.Namespace) -> None:
    """The race in the shape of ``options.scale``. The methods are verified on a small model, on the same device."""
    rows: list[MethodResult] = []

    def report(row: MethodResult) -> None:
        rows.append(row)
        print(row_line(row), flush=True)
        if options.out:
            write_results(options.out, "ablation-scale", rows, device=options.device)

    with torch.no_grad():
        verify(NeuronRace("llama-tiny", False).build(options.device))
        sample = options.sample or 48
        failed = race(options.scale, options.device, options.length, sample, options.runs or 3, report)
    if failed:
        raise SystemExit("\n".join(failed))


def measure_quality(count: int, device: str) -> dict:
    """The facts that a results file holds of the quality on ``count`` prompts; prints them, too."""
    began = time.monotonic()
    model, tokenizer = demo_model(device)
    asked = questions(tokenizer, count, device)
    with torch.no_grad():
        found = quality(
            model,
            asked,
            methods(),
            mean_activations(model, tokenizer),
            report=lambda done: print(f"\rquality: {done} of {len(asked)} prompts", end="", flush=True),
        )
    seconds = time.monotonic() - began
    print(f", {seconds:.0f} s")
    for name, kinds in found.items():
        figures = [f"{kind} {metric} {v['all']['median']:.3f}" for kind, m in kinds.items() for metric, v in m.items()]
        print(f"    {name:22} all layers: {', '.join(figures)}")
    return {
        "quality": found,
        "n_prompts": len(asked),
        "corpus": CORPUS,
        "quality_seconds": seconds,
        "quality_environment": environment(torch.device(device).type),
    }


def measure_quality_again(path: Path, count: int, device: str) -> None:
    """Replace the quality that a results file holds. Its race keeps its times, its commit and its environment."""
    result = json.loads(path.read_text())
    rows = [MethodResult(**row) for row in result.pop("rows")]
    result |= measure_quality(count, device)
    with_quality(rows, result["quality"], result["n_prompts"])
    path.write_text(json.dumps({**result, "rows": [row.as_dict() for row in rows]}, indent=1) + "\n")


def with_quality(rows: list[MethodResult], found: dict, count: int) -> None:
    """Fill in the quality of the demo's rows: for layer 0, or for all layers together."""
    for row in (row for row in rows if row.model == "demo" and row.provider in found):
        for metric in ("spearman", "top1_overlap"):
            by_kind = {kind: metrics[metric] for kind, metrics in found[row.provider].items()}
            one_layer = row.workload.endswith("layer 0")
            setattr(row, metric, {k: v["layers"][0] if one_layer else v["all"] for k, v in by_kind.items()})
        row.n_prompts = count


def summary(work: NeuronRace, rows: list[MethodResult], search: dict) -> str:
    """One workload in a few lines."""
    lines = [
        f"{work.model}, {rows[0].length} tokens, {work.name}: {rows[0].neurons} neurons; the fair ablation's batch of "
        f"{search['batch']} was found in {search['seconds']:.1f} s"
    ]
    return "\n".join([*lines, *map(row_line, rows)])


def row_line(row: MethodResult) -> str:
    """One method's row."""
    peak = "" if row.peak_bytes is None else f"  peak {row.peak_bytes / 2**20:7.1f} MiB"
    note = "" if row.sample is None else f"  scaled up from {row.sample} neurons"
    note = note if row.scaled is None else f"{note}  scaled: {row.scaled}"
    return (
        f"    {row.provider:28} {row.workload:22} {row.seconds:9.4f} s [{row.p20_s:.4f}, {row.p80_s:.4f}]"
        f"  {row.neurons_per_s:11.0f} neurons/s{peak}{note}"
    )


if __name__ == "__main__":
    main()
