"""How well every method ranks the neurons of the demo model by the measured effect of ablating them."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from depass_fast.adjoint.estimate import spearman
from depass_fast.demo import demo_prompts, load_demo
from depass_fast.demo.text import training_examples

from ..agreement import spread, top_overlap
from .fair import FairAblation
from .methods import ABLATIONS, PATCHING, Method

ZERO, MEAN = "zero", "mean"  # what an ablated activation is set to
METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {"spearman": spearman, "top1_overlap": top_overlap}
CORPUS = 256  # texts that the mean activations are taken over


@dataclass(frozen=True)
class Question:
    """A prompt's ids (N,) and the token whose logit is asked about: the right answer."""

    text: str
    ids: Tensor
    target: int


def demo_model(device: str = "cpu") -> tuple[nn.Module, object]:
    """The demo model with eager attention (the published algorithm needs it), and its tokenizer."""
    model, tokenizer = load_demo()
    model.config._attn_implementation = "eager"
    return model.requires_grad_(False).to(device), tokenizer


def questions(tokenizer: object, count: int, device: str = "cpu") -> list[Question]:
    """Held-out prompts of the demo: indirect objects (new pairs in new templates) and facts, half of each."""
    prompts = demo_prompts("ioi", "heldout", count=count // 2)
    prompts = [*prompts, *demo_prompts("facts", "heldout", count=count - len(prompts))]
    answers = tokenizer([p.answer for p in prompts], add_special_tokens=False)["input_ids"]
    ids = tokenizer([p.text for p in prompts])["input_ids"]
    return [
        Question(p.text, torch.tensor(i, device=device), a[0]) for p, i, a in zip(prompts, ids, answers, strict=True)
    ]


@torch.no_grad()
def mean_activations(model: nn.Module, tokenizer: object, texts: int = CORPUS) -> Tensor:
    """Every neuron's mean activation (L, I) over the first training texts, at all positions after the BOS."""
    layers = model.model.layers
    sums, count = torch.zeros(len(layers), layers[0].mlp.down_proj.in_features, device=model.device), 0

    def add(layer: int) -> Callable[[nn.Module, tuple[Tensor]], None]:
        return lambda module, args: sums[layer].add_(args[0][0, 1:].sum(0))

    hooks = [layer.mlp.down_proj.register_forward_pre_hook(add(i)) for i, layer in enumerate(layers)]
    try:
        for example in itertools.islice(training_examples(0, tokenizer.eos_token), texts):
            ids = tokenizer("".join(text for text, _ in example))["input_ids"]
            model(torch.tensor([ids], device=model.device), use_cache=False)
            count += len(ids) - 1
    finally:
        for hook in hooks:
            hook.remove()
    return sums / count


def quality(
    model: nn.Module,
    asked: Sequence[Question],
    methods: dict[str, Callable[[nn.Module], Method]],
    means: Tensor,
    batch: int = 64,
    report: Callable[[int], None] = lambda done: None,
) -> dict[str, dict[str, dict[str, dict]]]:
    """provider -> `zero` or `mean` -> `spearman` or `top1_overlap` -> {"all": spread, "layers": [spread, ...]}.

    Ablation by :class:`FairAblation` is the measure, so the ablations are left out. DePass asks for shares, whatever
    would be ablated: the same shares are compared with both effects.
    """
    truth, layers = FairAblation(model, batch), range(len(means))
    values = {ZERO: torch.zeros_like(means), MEAN: means}
    judged = {name: make(model) for name, make in methods.items() if name not in ABLATIONS}
    found: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(lambda: defaultdict(list))))
    for done, question in enumerate(asked):
        effects = {k: truth.effects(question.ids, question.target, layers, v).cpu() for k, v in values.items()}
        for name, method in judged.items():
            scores = {}
            for kind in values:
                if kind == ZERO or name == PATCHING:
                    scores[kind] = method.effects(question.ids, question.target, layers, values[kind]).cpu()
                else:
                    scores[kind] = scores[ZERO]
                for metric, measure in METRICS.items():
                    here = found[name][kind][metric]
                    here["all"].append(measure(scores[kind].flatten(), effects[kind].flatten()))
                    for layer in layers:
                        here[layer].append(measure(scores[kind][layer], effects[kind][layer]))
        report(done + 1)
    return {
        name: {
            kind: {
                metric: {"all": spread(here["all"]), "layers": [spread(here[layer]) for layer in layers]}
                for metric, here in metrics.items()
            }
            for kind, metrics in kinds.items()
        }
        for name, kinds in found.items()
    }
