"""The adjoint sweep against exact propagation: ``python -m bench.studies.adjoint [--out FILE.json] [--quick]``.

It measures agreement at every start layer on random Llamas and on held-out prompts of the demo model, speed in
interleaved runs, the gain of every part of the approximation, and faithfulness beside other methods. Goals stand beside
the figures. ``--quick`` runs all of it at sizes of seconds.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from depass_fast import DePass, Neurons, Trace
from depass_fast.adjoint.approximation import Approximation
from depass_fast.adjoint.estimate import spearman
from depass_fast.adjoint.stack import LayerStack
from depass_fast.adjoint.starts import make_start
from depass_fast.adjoint.sweep import Sweep
from depass_fast.demo import load_demo
from depass_fast.options import Adjoint, MethodName
from depass_fast.results.estimate import ApproximationWarning

from ..core.cli import command, picture, writable
from ..core.questions import demo_texts
from ..core.results import environment
from ..core.timing import interleaved
from .faithfulness import Curves, draw, measure_faithfulness

REFINED, TOP = 0.02, 0.01  # shares of a layer's neurons: those refined, and those to be found among them
GOALS = {"spearman": 0.99, "pearson": 0.99, "found": 0.95, "one layer": 20.0, "all layers": 50.0}
TARGET = 7


@dataclass(frozen=True)
class Size:
    """The sizes of a run."""

    scales: tuple[float, ...] = (0.02, 0.06, 0.1)
    layers: tuple[int, ...] = (6, 16)
    hidden: int = 256
    neurons: int = 704
    length: int = 16
    prompts: int = 2  # per random model
    demo: int = 60
    runs: int = 7


QUICK = Size(scales=(0.06,), layers=(3,), hidden=64, neurons=150, length=6, prompts=1, demo=4, runs=1)


def llama(scale: float, layers: int, size: Size) -> DePass:
    """A random Llama with weights of this scale."""
    config = AutoConfig.for_model(
        "llama",
        hidden_size=size.hidden,
        intermediate_size=size.neurons,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=1024,
        max_position_embeddings=512,
        initializer_range=scale,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return DePass(AutoModelForCausalLM.from_config(config).eval())


def random_trace(engine: DePass, length: int, seed: int = 1) -> Trace:
    ids = torch.randint(0, 1024, (length,), generator=torch.Generator().manual_seed(seed))
    return engine.trace(ids)


# ------------------------------------------------------------------------------------------------------ agreement


def agreement(found: Tensor, exact: Tensor, refined: Tensor) -> dict[str, float]:
    """One layer's scores (I,) against the exact ones; ``refined`` are the indices of the refined neurons."""
    top = exact.abs().topk(max(1, round(TOP * len(exact)))).indices
    return {
        "spearman": spearman(found, exact),
        "pearson": float(torch.corrcoef(torch.stack([found.double(), exact.double()]))[0, 1]),
        "found": float(torch.isin(top, refined).float().mean()),
        "relative_error": float((found - exact).norm() / exact.norm()),
    }


def compare(engine: DePass, trace: Trace, target: object) -> list[dict[str, dict[str, float]]]:
    """Return the agreement before and after refinement, and completeness, per start layer."""
    every, count = Neurons(layers="all"), engine.adapter.layer(0).mlp.w_down.shape[1]
    k = max(1, round(REFINED * count))
    exact = engine.attribute(trace, every, target, method="exact")
    screened = engine.attribute(trace, every, target, method=Adjoint(refine=0, sample=0))
    refined = engine.attribute(trace, every, target, method=Adjoint(refine=k, within="layer", sample=0))
    rows = []
    for layer in range(len(exact)):
        chosen = screened.scores[layer].abs().topk(k).indices
        rows.append(
            {
                "screened": agreement(screened.scores[layer], exact.scores[layer], chosen),
                "refined": agreement(refined.scores[layer], exact.scores[layer], chosen),
                "completeness": {
                    "screened": screened.by_layer[layer].completeness_error,
                    "refined": refined.by_layer[layer].completeness_error,
                    "rest": abs(float(refined.rest[layer] - exact.rest[layer])) / abs(float(exact.rest[layer])),
                },
            }
        )
    return rows


def averaged(model: str, per_prompt: list[list[dict]]) -> list[dict]:
    """A row per start layer: means over the prompts, and the least Spearman and Pearson of any prompt."""
    rows = []
    for layer in range(len(per_prompt[0])):
        row: dict[str, Any] = {"model": model, "layer": layer, "prompts": len(per_prompt)}
        for stage in ("screened", "refined"):
            values = [prompt[layer][stage] for prompt in per_prompt]
            row[stage] = {name: float(np.mean([v[name] for v in values])) for name in values[0]}
            row[stage] |= {f"least_{name}": min(v[name] for v in values) for name in ("spearman", "pearson")}
        row["completeness"] = {
            name: max(prompt[layer]["completeness"][name] for prompt in per_prompt)
            for name in per_prompt[0][layer]["completeness"]
        }
        row["reached"] = all(row["refined"][name] >= GOALS[name] for name in ("spearman", "pearson", "found"))
        rows.append(row)
    return rows


# ---------------------------------------------------------------------------------------------------------- speed


def speed(scale: float, size: Size) -> list[dict]:
    """Time exact against adjoint, for layer 0 and for all layers, from a trace and in turns."""
    engine = llama(scale, size.layers[0], size)
    trace = random_trace(engine, size.length)
    k, everything = max(1, round(REFINED * size.neurons)), Neurons(layers="all")

    def call(kind: Neurons, method: MethodName | Adjoint) -> Callable[[], object]:
        return lambda: engine.attribute(trace, kind, TARGET, method=method)

    rows = []
    for name, kind in (("one layer", Neurons(0)), ("all layers", everything)):
        candidates = {
            "exact": call(kind, method="exact"),
            "screened": call(kind, method=Adjoint(refine=0, sample=0)),
            "refined": call(kind, method=Adjoint(refine=k, within="layer", sample=0)),
        }
        seconds = {key: float(np.median(value)) for key, value in interleaved(candidates, size.runs).items()}
        ratios = {key: seconds["exact"] / seconds[key] for key in ("screened", "refined")}
        rows.append({"workload": name, "scale": scale, "seconds": seconds, "ratios": ratios, "goal": GOALS[name],
                     "reached": ratios["screened"] >= GOALS[name]})  # fmt: skip
    return rows


# ------------------------------------------------------------------------------------------- the gain of each part


def variants(count: int) -> dict[str, tuple[dict, Adjoint]]:
    """The approximation with its parts taken away or added; the library does the last but one."""
    k = max(1, round(REFINED * count))
    silent, none = float("inf"), Adjoint(0, "all", 0)
    within = Adjoint(k, "layer", 0)
    return {
        "crowd's mean alone": ({"loud": silent, "scatter": False}, none),
        "+ scatter (random signs)": ({"loud": silent}, none),
        "+ loud ones above 5": ({"loud": 5.0}, none),
        "+ loud ones above 2.5": ({"loud": 2.5}, none),
        "+ loud ones above 2.5, never released": ({"loud": 2.5, "releases": False}, none),
        "+ loud ones above 1.5": ({"loud": 1.5}, none),
        "crowd's mean, refined (second pass)": ({"loud": silent, "scatter": False}, within),
        "all: above 2.5, refined (second pass)": ({"loud": 2.5}, within),
        "all, above 1.5": ({"loud": 1.5}, within),
    }


@torch.no_grad()
def sweep_with(engine: DePass, trace: Trace, prompt: int, target: int, changes: dict, method: Adjoint) -> list[Tensor]:
    """Scores (I,) of every layer by a sweep with other approximations than the library's."""
    adapter, n = engine.adapter, trace.length(prompt)
    starts = [make_start(Neurons(i), adapter, trace, prompt, n, False, torch.float32) for i in range(adapter.n_layers)]
    norm, at = adapter.final_norm(), trace.span(prompt).stop - 1
    assert norm is not None and norm.weight is not None  # a Llama's
    unembedding: Any = adapter.unembedding
    seeds = unembedding.weight[target] * norm.weight * norm.scale(trace.resid_final[at])
    stack = LayerStack(adapter, trace, prompt, n, adapter.n_layers, torch.float32, torch.float32)
    sweep = Sweep(stack, starts, seeds[None], Approximation(0.1, **changes), None)
    return [scores[0] for scores in sweep.run(method).named]


def ablation(name: str, engine: DePass, trace: Trace, targets: list[int]) -> list[dict]:
    """The agreement of every variant at its worst start layer (mean over prompts), and the FLOP of its products."""
    every = Neurons(layers="all")
    exact = engine.attribute(trace, every, targets=targets, method="exact")
    with FlopCounterMode(display=False) as counter:
        engine.attribute(trace, every, targets=targets, method="exact")
    whole = counter.get_total_flops()
    rows = []
    for label, (changes, method) in variants(exact[0].scores.shape[1]).items():
        figures = []
        with FlopCounterMode(display=False) as counter:
            found = [sweep_with(engine, trace, p, t, changes, method) for p, t in enumerate(targets)]
        for p, scores in enumerate(found):
            refined = [s.abs().topk(max(1, round(REFINED * len(s)))).indices for s in scores]
            figures.append([agreement(*row) for row in zip(scores, exact[p].scores, refined, strict=True)])
        worst = {
            key: min(float(np.mean([f[layer][key] for f in figures])) for layer in range(len(figures[0])))
            for key in ("spearman", "pearson", "found")
        }
        error = max(float(np.mean([f[layer]["relative_error"] for f in figures])) for layer in range(len(figures[0])))
        rows.append({"model": name, "variant": label, **worst, "relative_error": error,
                     "flop_share": counter.get_total_flops() / whole})  # fmt: skip
    return rows


# ----------------------------------------------------------------------------------------------------------- main


def run(size: Size) -> dict:
    """Measure everything and print figures as they come."""
    began, rows, parts, speeds = time.perf_counter(), [], [], []
    model, tokenizer = load_demo()
    demo = DePass(model, tokenizer)
    texts = demo_texts(size.demo)
    for scale in size.scales:
        speeds += speed(scale, size)
        for row in speeds[-2:]:
            print(f"speed   scale {scale:<5} {row['workload']:11} "
                  + "  ".join(f"{key} {value:.1f}x" for key, value in row["ratios"].items()), flush=True)  # fmt: skip
    for scale in size.scales:
        for layers in size.layers:
            engine, name = llama(scale, layers, size), f"random, scale {scale}, {layers} layers"
            traces = [random_trace(engine, size.length, seed) for seed in range(size.prompts)]
            rows += show(averaged(name, [compare(engine, trace, TARGET) for trace in traces]))
    traces = [demo.trace(text) for text, _ in texts]
    targets = [tokenizer.encode(answer, add_special_tokens=False)[0] for _, answer in texts]
    rows += show(averaged("demo", [compare(demo, *pair) for pair in zip(traces, targets, strict=True)]))
    hard = llama(size.scales[-1], size.layers[0], size)
    prompts = [torch.randint(0, 1024, (size.length,), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    parts += ablation(f"random, scale {size.scales[-1]}, {size.layers[0]} layers", hard, hard.trace(prompts), [7, 7])
    few = max(2, size.demo // 3)
    parts += ablation("demo", demo, demo.trace([text for text, _ in texts[::3][:few]]), targets[::3][:few])
    for row in parts:
        print(f"{row['model']:32} {row['variant']:38} spearman {row['spearman']:.4f}  pearson {row['pearson']:.4f}  "
              f"found {row['found']:.3f}  error {row['relative_error']:.3f}  FLOP {row['flop_share']:.2%}")  # fmt: skip
    curves: Curves = measure_faithfulness(demo, texts)
    for method, values in curves["accuracy"].items():
        print(f"masked  {method:22} " + "  ".join(f"{f:.2%}: {v:.2f}" for f, v in zip(curves["shares"], values)))  # noqa: B905
    return {
        "agreement": rows,
        "speed": speeds,
        "parts": parts,
        "faithfulness": curves,
        "goals": GOALS,
        "minutes": (time.perf_counter() - began) / 60,
    }


def show(rows: list[dict]) -> list[dict]:
    for row in rows:
        cells = [f"{stage} " + " ".join(f"{row[stage][n]:.4f}" for n in ("spearman", "pearson", "found"))
                 for stage in ("screened", "refined")]  # fmt: skip
        error = row["completeness"]["refined"]
        below = "" if row["reached"] else "  BELOW"
        print(
            f"{row['model']:32} layer {row['layer']:2}  {'  '.join(cells)}  completeness {error:.0e}{below}", flush=True
        )
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = command("bench.studies.adjoint", __doc__)
    parser.add_argument("--out", type=writable, help="write the figures to this JSON file")
    parser.add_argument(
        "--plot", type=picture, help="write the faithfulness curves to this SVG file (needs matplotlib)"
    )
    parser.add_argument("--quick", action="store_true", help="sizes of seconds")
    options = parser.parse_args(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ApproximationWarning)
        found = run(QUICK if options.quick else Size())
    if options.out:
        content = {"benchmark": "adjoint", "environment": environment(), "quick": options.quick, **found}
        options.out.write_text(json.dumps(content, indent=1) + "\n")
    if options.plot:
        draw(found["faithfulness"], options.plot)


if __name__ == "__main__":
    main()
