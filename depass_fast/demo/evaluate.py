"""Figures of a demo model: indirect objects, facts by language, verdicts and a linear probe for truth."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from . import lexicon as lx
from .text import Statement, fact_prompts, ioi_prompts, statements

BATCH = 256


def _last(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast, run: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply ``run`` to the ids of all texts, in batches ``[B, T]`` of one length, which need no attention mask."""
    ids = tokenizer(list(texts))["input_ids"]
    out: list[Tensor] = [torch.empty(0)] * len(ids)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for _, group in itertools.groupby(order, key=lambda i: len(ids[i])):
        same = list(group)
        for start in range(0, len(same), BATCH):
            batch = same[start : start + BATCH]
            with torch.no_grad():
                result = run(torch.tensor([ids[i] for i in batch])).cpu()
            for i, row in zip(batch, result, strict=True):
                out[i] = row
    return torch.stack(out)


def next_tokens(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    """Return the likeliest next id of every text ``[N]``."""
    return _last(texts, tokenizer, lambda ids: model(ids.to(model.device), use_cache=False).logits[:, -1].argmax(-1))


def hidden_states(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Tensor:
    """Return the input of each layer and the final norm's output at every text's last token ``[N, layers + 1, D]``."""

    def run(ids: Tensor) -> Tensor:
        states = model.model(ids.to(model.device), output_hidden_states=True, use_cache=False).hidden_states
        return torch.stack([h[:, -1] for h in states], dim=1).float()

    return _last(texts, tokenizer, run)


def accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], answers: Sequence[str]
) -> float:
    """Return the share of texts whose likeliest next token is the answer, a single token."""
    ids = tokenizer(list(answers), add_special_tokens=False)["input_ids"]
    if any(len(i) != 1 for i in ids):
        raise ValueError("an answer is not a single token")
    return (next_tokens(model, tokenizer, texts) == torch.tensor(ids)[:, 0]).float().mean().item()


def fit_probe(x: Tensor, y: Tensor, penalty: float = 1e-3, steps: int = 60) -> tuple[Tensor, Tensor]:
    """Fit a logistic regression of ``y`` ``[N]`` on ``x`` ``[N, D]``: weight ``[D]`` and bias ``[]``."""
    mean, scale = x.mean(0), x.std(0) + 1e-6
    z = (x - mean) / scale
    weight = torch.zeros(x.shape[1], requires_grad=True)
    bias = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = z @ weight + bias
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, y.float()) + penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    final = weight.detach() / scale
    return final, bias.detach() - final @ mean


def with_recall(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, items: Sequence[Statement]) -> list[str]:
    """Return each statement with what the model itself recalls after it, right or wrong: a text up to the verdict."""
    prompts = [s.text + s.recall for s in items]
    recalled = next_tokens(model, tokenizer, prompts).tolist()
    return [f"{prompt}{tokenizer.decode([token])}." for prompt, token in zip(prompts, recalled, strict=True)]


def probe_by_layer(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, recall: bool) -> list[float]:
    """Return a truth probe's test accuracy on the last full stop's hidden state, for the embedding and each layer.

    That full stop follows the model's own ``recall``, or the statement itself. The probe is fitted on the entities that
    the training showed statements about, and tested on the others.
    """
    data = {}
    for split in ("train", "heldout"):
        items = statements(split)
        texts = with_recall(model, tokenizer, items) if recall else [s.text for s in items]
        data[split] = (hidden_states(model, tokenizer, texts), torch.tensor([s.label for s in items]))
    figures = []
    for layer in range(data["train"][0].shape[1]):
        weight, bias = fit_probe(data["train"][0][:, layer], data["train"][1])
        predicted = data["heldout"][0][:, layer] @ weight + bias > 0
        figures.append((predicted == data["heldout"][1]).float().mean().item())
    return figures


def evaluate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return all figures, as shares between 0 and 1."""
    figures: dict[str, Any] = {}
    for split in ("train", "heldout_pairs", "heldout_templates", "heldout"):
        ioi = ioi_prompts(split, 2000)
        figures[f"ioi_{split}"] = accuracy(model, tokenizer, [p.text for p in ioi], [p.answer for p in ioi])
        if split == "heldout":
            for order in ("ABBA", "BABA"):
                part = [p for p in ioi if p.order == order]
                figures[f"ioi_{split}_{order}"] = accuracy(
                    model, tokenizer, [p.text for p in part], [p.answer for p in part]
                )
    for language in lx.LANGUAGES:
        facts = fact_prompts("all", language)
        figures[f"facts_{language}"] = accuracy(model, tokenizer, [p.text for p in facts], [p.answer for p in facts])
    for split in ("train", "heldout"):
        items = statements(split)
        texts = with_recall(model, tokenizer, items)
        figures[f"verdicts_{split}"] = accuracy(model, tokenizer, texts, [s.verdict for s in items])
    for name, recall in (("truth_probe", True), ("truth_probe_without_recall", False)):
        layers = probe_by_layer(model, tokenizer, recall)
        figures[f"{name}_by_layer"] = [round(v, 4) for v in layers]
        figures[f"{name}_best"] = max(layers)
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}


def targets_met(figures: dict[str, Any]) -> bool:
    """True for 97 % of held-out indirect objects and of the facts in each language, and 90 % for the probe."""
    knows = [v for k, v in figures.items() if k.startswith(("ioi_heldout", "facts_"))]
    return all(v >= 0.97 for v in knows) and figures["truth_probe_best"] >= 0.90


def main() -> None:
    """Print the figures of the shipped model, or of the one in the folder given."""
    from . import load_demo

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--path", default=None, help="folder of the model (default: the shipped one)")
    figures = evaluate(*load_demo(path=parser.parse_args().path))
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
