"""The quality of every method on the demo model: its ranking of neurons against the measured effects of ablation."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from depass_fast.adjoint.estimate import spearman
from depass_fast.demo.text import training_examples

from ...baselines.fair_ablation import FairAblation
from ...baselines.neuron_methods import ABLATIONS, PATCHING, Method
from ...core.agreement import spread, top_overlap
from ...core.models import Model
from ...core.questions import Question

ZERO, MEAN = "zero", "mean"  # the value of an ablated activation
METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {"spearman": spearman, "top1_overlap": top_overlap}
CORPUS = 256  # texts that the mean activations are taken over


@torch.no_grad()
def mean_activations(model: Model, tokenizer: PreTrainedTokenizerBase, texts: int = CORPUS) -> Tensor:
    """Every neuron's mean activation (L, I) over the first training texts, at all positions after the BOS."""
    layers = model.model.layers
    sums, count = torch.zeros(len(layers), layers[0].mlp.down_proj.in_features, device=model.device), 0

    def add(layer: int) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def hook(module: nn.Module, args: tuple[Tensor]) -> None:  # a returned tensor would replace the activations
            sums[layer] += args[0][0, 1:].sum(0)

        return hook

    hooks = [layer.mlp.down_proj.register_forward_pre_hook(add(i)) for i, layer in enumerate(layers)]
    try:
        for example in itertools.islice(training_examples(0, str(tokenizer.eos_token)), texts):
            ids = tokenizer("".join(text for text, _ in example))["input_ids"]
            model(torch.tensor([ids], device=model.device), use_cache=False)
            count += len(ids) - 1
    finally:
        for hook in hooks:
            hook.remove()
    return sums / count


def quality(
    model: Model,
    asked: Sequence[Question],
    methods: dict[str, Callable[[Model], Method]],
    means: Tensor,
    batch: int = 64,
    report: Callable[[int], None] = lambda done: None,
) -> dict[str, dict[str, dict[str, dict]]]:
    """provider -> `zero` or `mean` -> `spearman` or `top1_overlap` -> {"all": spread, "layers": [spread, ...]}.

    Ablation by :class:`FairAblation` is the measure, so the ablations are left out. The shares of DePass know of no
    ablation: the same shares are compared with both effects.
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
