"""The adjoint sweep on trained models: ``python -m bench.studies.trained --model PATH [--out FILE.json]``.

All neurons of a model that nobody here trained, by the default sweep and exactly, for twenty natural prompts. It prints
the relative error of every start layer beside its estimate, and the warnings. ``--gguf FILE`` names a GGUF file in the
folder. The exact runs take minutes per prompt; ``--layers`` and ``--prompts`` choose fewer.
"""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path

import torch

from depass_fast import ApproximationWarning, DePass, Neurons
from depass_fast.options import Adjoint

from ..core.cli import command
from ..core.results import environment

PROMPTS = (
    "Once upon a time there was a little girl named",
    "The capital of France is",
    "When Mary and John went to the store, John gave a drink to",
    "She opened the door and saw that the room was",
    "Water boils at a temperature of one hundred degrees",
    "My favourite thing about summer is going to the",
    "The quick brown fox jumps over the lazy",
    "In 1969, the first man walked on the",
    "To make bread you need flour, water, salt and",
    "The largest planet in the solar system is",
    "He was late for work because his car",
    "Shakespeare wrote the famous tragedy Romeo and",
    "I think, therefore I",
    "The opposite of hot is",
    "After the rain stopped, the children went outside to",
    "The doctor told the patient to take the",
    "Two plus two equals",
    "The company announced that its profits had risen by ten",
    "def add(a, b):\n    return a +",
    "Dear Sir or Madam, I am writing to",
)
WRONG, RIGHT = 0.05, 0.02  # above the first a layer must be named, below the second it must not


def compare(engine: DePass, prompt: str, layers: list[int]) -> dict:
    """Return the true and the estimated relative error of every one of ``layers``, by the sweep over all layers."""
    trace = engine.trace(prompt)
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ApproximationWarning)
        found = engine.attribute(trace, Neurons(layers="all"), method=Adjoint())
    seconds = time.perf_counter() - began
    exact = engine.attribute(trace, Neurons(layers=layers), method="exact")
    assert found.estimate is not None and found.estimate.layer_errors is not None
    rows = []
    for one in exact:
        named = len(one.labels) - one.n_extras
        off = (found[one.layer].scores - one.scores)[:named].norm() / one.scores[:named].norm()
        rows.append({"layer": one.layer, "error": float(off), "estimate": found.estimate.layer_errors[one.layer]})
    return {"prompt": prompt, "tokens": trace.length(0), "seconds": seconds, "layers": rows, "warnings": found.warnings}


def show(result: dict) -> None:
    """Print a prompt's worst layer, and its warnings."""
    worst = max(result["layers"], key=lambda row: row["error"])
    missed = [r["layer"] for r in result["layers"] if r["error"] > WRONG and f"layer {r['layer']} " not in said(result)]
    print(f"{result['prompt'][:40]!r:45} {result['tokens']:3} tokens {result['seconds']:6.1f} s   worst layer "
          f"{worst['layer']:2}: {worst['error']:.2%} (estimate {worst['estimate']:.2%})   unnamed above {WRONG:.0%}: "
          f"{missed or 'none'}   {said(result) or 'no warning'}", flush=True)  # fmt: skip


def said(result: dict) -> str:
    """Return the warnings as one text."""
    return "; ".join(result["warnings"] or [])


def main(arguments: list[str] | None = None) -> None:
    parser = command("bench.studies.trained", __doc__)
    parser.add_argument("--model", required=True, help="a folder, or a hub name")
    parser.add_argument("--gguf", help="the GGUF file in that folder")
    parser.add_argument("--layers", type=int, nargs="+", help="start layers that are compared (default: all)")
    parser.add_argument("--prompts", type=int, nargs="+", default=range(len(PROMPTS)), help="which prompts, from 0 on")
    parser.add_argument("--name", help="the model's name in the file")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    options = parser.parse_args(arguments)
    more = {"gguf_file": options.gguf} if options.gguf else {}
    engine = DePass.from_pretrained(options.model, dtype=torch.float32, model_kwargs=more, progress=False)
    layers = options.layers or list(range(engine.adapter.n_layers - 1))
    results = []
    for index in options.prompts:
        results.append(compare(engine, PROMPTS[index], layers))
        show(results[-1])
        if options.out:
            name = options.name or Path(options.model).name
            content = {"benchmark": "trained", "environment": environment(), "model": name, "prompts": results}
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
