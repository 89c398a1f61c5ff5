"""Faithfulness on the demo model: accuracy when the neurons that a method ranks highest are masked.

``python -m bench.studies.faithfulness [--plot FILE.svg]``. A neuron is masked by zeroing its activation at
every position, in an ordinary forward pass. Each method ranks the neurons of all layers by how much it says they raise
the answer's logit: exact scores, adjoint scores, attribution patching (gradient times activation), norm, and random
numbers. The sooner the accuracy falls, the more faithful is the method.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from depass_fast import DePass, Neurons
from depass_fast.demo import load_demo
from depass_fast.evaluate.interventions import PARTS, masked_logits
from depass_fast.evaluate.methods.norms import neuron_norms
from depass_fast.options import Adjoint

from ..baselines.neuron_methods import AttributionPatching
from ..core.cli import command, picture
from ..core.questions import demo_texts

SHARES = (0.0, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05)  # of all neurons


class Curves(TypedDict):
    """``accuracy[method][i]`` with the share ``shares[i]`` of all neurons masked, over ``prompts`` prompts."""

    shares: list[float]
    accuracy: dict[str, list[float]]
    prompts: int
    neurons: int


def rankings(engine: DePass, ids: Tensor, target: int, seed: int) -> dict[str, Tensor]:
    """The scores of every neuron by every method: (layers, I) each."""
    trace, every = engine.trace(ids), Neurons(layers="all")
    norms = neuron_norms(engine, trace)
    patching = AttributionPatching(engine.model)
    return {
        "exact": engine.attribute(trace, every, target, method="exact").scores,
        "adjoint": engine.attribute(trace, every, target, method=Adjoint(sample=0)).scores,
        "attribution patching": patching.effects(ids, target, range(len(norms)), torch.zeros_like(norms)),
        "norm": norms,
        "random": torch.rand(norms.shape, generator=torch.Generator().manual_seed(seed)),
    }


def masked_predictions(engine: DePass, ids: Tensor, masks: Tensor, part: str = "down_proj") -> Tensor:
    """The next token after ids (N,) under each of ``masks`` (B, layers, W): (B,).

    What is masked is set to zero at every position where the module ``part`` reads it: neurons where `down_proj` does,
    heads where `o_proj` does.
    """
    kind = next(kind for kind, module in PARTS.items() if module == part)
    return masked_logits(engine, ids, masks, kind).argmax(-1)


def measure_faithfulness(engine: DePass, texts: list[tuple[str, str]]) -> Curves:
    """Accuracy curves over prompts with their answers."""
    tokenizer = engine.tokenizer
    assert tokenizer is not None  # the demo's
    hits: dict[str, Tensor] = {}
    neurons = 0
    for seed, (text, answer) in enumerate(texts):
        ids = torch.tensor(tokenizer.encode(text))
        target = tokenizer.encode(answer, add_special_tokens=False)[0]
        for method, scores in rankings(engine, ids, target, seed).items():
            neurons = scores.numel()
            order = scores.flatten().argsort(descending=True)
            masks = torch.zeros(len(SHARES), neurons, dtype=torch.bool)
            for mask, share in zip(masks, SHARES, strict=True):
                mask[order[: round(share * neurons)]] = True
            right = masked_predictions(engine, ids, masks.view(-1, *scores.shape)) == target
            hits[method] = hits.get(method, torch.zeros(len(SHARES), dtype=torch.int64)) + right
    accuracy = {method: (counts / len(texts)).tolist() for method, counts in hits.items()}
    return Curves(shares=list(SHARES), accuracy=accuracy, prompts=len(texts), neurons=neurons)


def draw(curves: Curves, path: Path) -> None:
    """The curves as an SVG file. Needs matplotlib."""
    import matplotlib  # pyright: ignore[reportMissingImports] (the extra `bench`)

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "depass_fast"  # the same file from the same figures
    from matplotlib import pyplot  # pyright: ignore[reportMissingImports] (the extra `bench`)

    figure, axes = pyplot.subplots(figsize=(6.4, 3.8))
    styles = {"exact": "-o", "adjoint": "--s", "attribution patching": "-^", "norm": "-v", "random": ":x"}
    for method, values in curves["accuracy"].items():
        axes.plot([100 * share for share in curves["shares"]], values, styles[method], label=method, markersize=4)
    axes.set_xscale("symlog", linthresh=0.05)
    axes.set_xticks([100 * share for share in curves["shares"]])
    axes.set_xticklabels([f"{100 * share:g}" for share in curves["shares"]])
    axes.set_xlabel(f"masked, % of {curves['neurons']} neurons")
    axes.set_ylabel(f"accuracy on {curves['prompts']} prompts")
    axes.set_ylim(-0.02, 1.02)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = command("bench.studies.faithfulness", __doc__)
    parser.add_argument("--plot", type=picture, help="write the curves to this SVG file (needs matplotlib)")
    parser.add_argument("--prompts", type=int, default=60)
    options = parser.parse_args(arguments)
    curves = measure_faithfulness(DePass(*load_demo()), demo_texts(options.prompts))
    for method, values in curves["accuracy"].items():
        cells = [f"{share:.2%}: {value:.2f}" for share, value in zip(curves["shares"], values, strict=True)]
        print(f"{method:22} {'  '.join(cells)}")
    if options.plot:
        draw(curves, options.plot)


if __name__ == "__main__":
    main()
