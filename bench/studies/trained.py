"""The adjoint sweep on trained models: ``python -m bench.studies.trained --model PATH [--out FILE.json]``.

All neurons of a model that nobody here trained, by the default sweep and exactly, for twenty natural prompts. It prints
the relative error of every start layer beside its estimate, the warnings, and how long a prompt took. PATH may be a
GGUF file. The exact runs take minutes per prompt; ``--layers`` and ``--prompts`` choose fewer.
The file is written after every prompt. A run that is started again keeps the prompts that it holds.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from depass_fast import DePass
from depass_fast.evaluate.statistics import relative_error
from depass_fast.evaluate.studies.adjoint import WRONG, exact_layers, is_named, pairs, sweep
from depass_fast.options import Adjoint

from ..core.cli import command, writable
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


def compare(engine: DePass, prompt: str, layers: list[int]) -> dict:
    """Return the true and the estimated relative error of every one of ``layers``, by the sweep over all layers."""
    trace = engine.trace(prompt)
    found, seconds = sweep(engine, trace, Adjoint())
    exact, exact_seconds = exact_layers(engine, trace, layers)
    assert found.estimate is not None and found.estimate.layer_errors is not None
    estimated = found.estimate.layer_errors
    rows = [
        {"layer": layer, "error": relative_error(scores, true), "estimate": estimated[layer]}
        for layer, scores, true in pairs(found, exact)
    ]
    return {
        "prompt": prompt,
        "tokens": trace.length(0),
        "seconds": seconds,
        "exact_seconds": exact_seconds,
        "layers": rows,
        "warnings": found.warnings,
        "commit": environment()["commit"],
    }


def show(result: dict) -> None:
    """Print a prompt's worst layer, and its warnings."""
    worst = max(result["layers"], key=lambda row: row["error"])
    missed = [
        r["layer"] for r in result["layers"] if r["error"] > WRONG and not is_named(r["layer"], result["warnings"])
    ]
    print(f"{result['prompt'][:40]!r:45} {result['tokens']:3} tokens  sweep {result['seconds']:6.1f} s, exact "
          f"{result['exact_seconds']:6.1f} s   worst layer "
          f"{worst['layer']:2}: {worst['error']:.2%} (estimate {worst['estimate']:.2%})   unnamed above {WRONG:.0%}: "
          f"{missed or 'none'}   {'; '.join(result['warnings'] or []) or 'no warning'}", flush=True)  # fmt: skip


def done_before(path: Path | None, model: str, layers: list[int]) -> list[dict]:
    """Return the prompts that a file holds, of the same model and start layers.

    Raises:
        ValueError: it holds another model or other layers.
    """
    if path is None or not path.exists():
        return []
    before = json.loads(path.read_text())
    if before.get("benchmark") != "trained":
        raise ValueError(f"{path}: it holds no figures of bench.studies.trained; give another file.")
    if before["model"] != model:
        raise ValueError(
            f"{path}: it holds figures of {before['model']}, this is {model}; give another file, or --name."
        )
    for result in before["prompts"]:
        compared = [row["layer"] for row in result["layers"]]
        if compared != layers:
            raise ValueError(
                f"{path}: it holds start layers {compared}, asked are {layers}; give another file, or its --layers."
            )
    return before["prompts"]


def write(path: Path, model: str, results: list[dict]) -> None:
    """Write the figures; a file that is there is replaced when the new one is whole."""
    content = {"benchmark": "trained", "environment": environment(), "model": model, "prompts": results}
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def main(arguments: list[str] | None = None) -> None:
    parser = command("bench.studies.trained", __doc__)
    parser.add_argument("--model", required=True, help="a folder, a GGUF file, or a hub name")
    parser.add_argument("--layers", type=int, nargs="+", help="start layers that are compared (default: all)")
    parser.add_argument("--prompts", type=int, nargs="+", default=range(len(PROMPTS)), help="which prompts, from 0 on")
    parser.add_argument("--name", help="the model's name in the file")
    parser.add_argument("--out", type=writable, help="write the figures to this JSON file, and keep what it holds")
    options = parser.parse_args(arguments)
    if not all(0 <= index < len(PROMPTS) for index in options.prompts):
        parser.error(f"--prompts: {list(options.prompts)}; there are 0 to {len(PROMPTS) - 1}")
    engine = DePass.from_pretrained(options.model, dtype=torch.float32, progress=False)
    count, name = engine.adapter.n_layers, options.name or Path(options.model).name
    layers = sorted(set(options.layers)) if options.layers else list(range(count - 1))
    if not all(0 <= layer < count for layer in layers):
        parser.error(f"--layers: {layers}; the model has 0 to {count - 1}")
    try:
        results = done_before(options.out, name, layers)
    except ValueError as error:
        parser.error(str(error))
    for prompt in (PROMPTS[index] for index in options.prompts):
        if any(result["prompt"] == prompt for result in results):
            print(f"{prompt[:40]!r:45} is in {options.out}", flush=True)
            continue
        results.append(compare(engine, prompt, layers))
        show(results[-1])
        if options.out:
            write(options.out, name, results)


if __name__ == "__main__":
    main()
