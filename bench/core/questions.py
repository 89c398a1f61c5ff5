"""Held-out prompts of the demo model with their answers, half indirect objects and half facts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from depass_fast.demo import demo_prompts, load_demo
from depass_fast.demo.text import fact_prompts, ioi_prompts

from .models import Model


@dataclass(frozen=True)
class Question:
    """A prompt's ids (N,) and the target token, which is the right answer."""

    text: str
    ids: Tensor
    target: int


def demo_model(device: str = "cpu") -> tuple[Model, PreTrainedTokenizerBase]:
    """The demo model with eager attention (the published algorithm needs it), and its tokenizer."""
    model: Model
    model, tokenizer = load_demo()
    model.config._attn_implementation = "eager"
    return model.requires_grad_(False).to(device), tokenizer


def questions(tokenizer: PreTrainedTokenizerBase, count: int, device: str = "cpu") -> list[Question]:
    """``count`` prompts: indirect objects (new pairs in new templates), then facts."""
    prompts = demo_prompts("ioi", "heldout", count=count // 2)
    prompts = [*prompts, *demo_prompts("facts", "heldout", count=count - len(prompts))]
    answers = tokenizer([p.answer for p in prompts], add_special_tokens=False)["input_ids"]
    ids = tokenizer([p.text for p in prompts])["input_ids"]
    return [
        Question(p.text, torch.tensor(i, device=device), a[0]) for p, i, a in zip(prompts, ids, answers, strict=True)
    ]


def demo_texts(count: int) -> list[tuple[str, str]]:
    """``count`` prompts with their answers: indirect objects, then facts spread over the held-out entities."""
    ioi, facts = ioi_prompts("heldout", count), fact_prompts("heldout")
    step = max(1, len(facts) // max(1, count // 2))
    chosen = [*ioi[: count - count // 2], *facts[::step][: count // 2]]
    return [(prompt.text, prompt.answer) for prompt in chosen]
