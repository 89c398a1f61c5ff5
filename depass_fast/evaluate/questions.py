"""Prompts with their answers, those that the model answers, and the three targets that a method is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..demo import demo_prompts
from ..engine import DePass
from ..inputs.records import read_records
from ..inputs.targets import Contrast, LogProb
from ..inputs.text import spaced
from .interventions import next_logits

ANSWERS = ("answer", "attribute", "target_token")  # the field's names in the published files
LOGIT, LOG_PROB, CONTRAST = "logit", "log-prob", "contrast"
READS = (LOGIT, LOG_PROB, CONTRAST)


class Text(NamedTuple):
    """A prompt and its answer, as a file gives them."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Question:
    """A prompt that the model answers.

    ids: (N,) int64, on the model's device. target: the first token of the answer, the model's next token. foil: the
    most probable other token, the contrast's second. special: (N,) bool, the special tokens, which no study removes.
    number: the place in the file, from 0.
    """

    number: int
    prompt: str
    answer: str
    ids: Tensor
    target: int
    foil: int
    special: Tensor

    @property
    def targets(self) -> list[Any]:
        """The targets of :data:`READS`, in their order, as :meth:`depass_fast.DePass.attribute` takes them."""
        return [self.target, LogProb(self.target), Contrast(self.target, self.foil)]

    def values(self, logits: Tensor) -> Tensor:
        """Return the targets' values under logits (..., V): (..., 3)."""
        own = logits[..., self.target]
        return torch.stack([own, own - logits.logsumexp(-1), own - logits[..., self.foil]], -1)


def read_texts(path: Path | None, task: str = "ioi", count: int = 200) -> list[Text]:
    """Read the prompts of a file, or ``count`` held-out prompts of the demo model for ``task`` "ioi" or "facts".

    Raises:
        OSError, ValueError: as :func:`depass_fast.inputs.records.read_records`.
    """
    if path is None:
        found = demo_prompts("ioi", count=count) if task == "ioi" else demo_prompts("facts", count=count)
        return [Text(one.text, one.answer) for one in found]
    records = read_records(path, {"prompt": str}, [ANSWERS])
    return [Text(one["prompt"], next(one[name] for name in ANSWERS if name in one)) for one in records]


def answered(engine: DePass, texts: Sequence[Text], first: int = 0) -> Iterator[Question | None]:
    """Yield a question for every text from ``first`` on, None where the model's next token is not the answer's first.

    Raises:
        ValueError: the engine has no tokenizer.
    """
    tokenizer: Any = engine.tokenizer
    if tokenizer is None:
        raise ValueError("tokenizer: the prompts are texts, and this engine has none; give DePass(model, tokenizer).")
    special = torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=torch.long)
    for number, text in enumerate(texts[first:], first):
        ids = torch.tensor(tokenizer.encode(text.prompt), dtype=torch.long)
        target = first_token(tokenizer, spaced(text.prompt, text.answer))
        leading = next_logits(engine, ids[None])[0].topk(2).indices.tolist()
        if leading[0] != target:
            yield None
            continue
        is_special = torch.isin(ids, special)
        place = engine.adapter.device
        yield Question(number, *text, ids.to(place), target, leading[1], is_special.to(place))


def first_token(tokenizer: Any, text: str) -> int:
    """Return the first token of a text that follows another one, as :func:`following_tokens`."""
    return following_tokens(tokenizer, text)[0]


def following_tokens(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text that follows another one: no special tokens, no second word boundary.

    Raises:
        ValueError: there are none.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    if not ids:
        raise ValueError(f"answer: {text!r} has no tokens.")
    # SentencePiece may put a boundary of its own in front of a space: a piece that is nothing but space
    lone = len(ids) > 1 and not tokenizer.decode(ids[:1]).strip() and text.strip()
    return ids[1:] if lone else ids
