"""Questions with a right and a wrong answer, asked without information, with right and with misleading information."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...demo import demo_prompts
from ...engine import DePass
from ...inputs.records import read_records
from ..questions import following_tokens

NONE, RIGHT, WRONG = "none", "right", "misleading"
INFORMATION = {NONE: "prompt_init", RIGHT: "prompt_correct", WRONG: "prompt_wrong"}  # the fields of the published file
OPTIONS = ("A", "B")
LETTER, WORDS = "letter", "words"  # the forms of an answer
PREAMBLE = "According to the given information and your knowledge, answer the question.\n"


@dataclass(frozen=True)
class Asked:
    """A question in one form: prompts by the information that they give, the misleading ``claim``, both answers.

    ``option`` is the letter of the right answer, None where answers are words.
    """

    prompts: Mapping[str, str]
    claim: str
    right: str
    wrong: str
    option: str | None = None


@dataclass(frozen=True)
class Encoded:
    """A question in tokens: ``ids`` (N,) int64 of every prompt, on the model's device, and what follows each answer.

    Both answers begin with the last ``begun`` tokens of a prompt; ``right`` and ``wrong`` are the first ones that
    differ. Masks are (N,) bool in host memory, of the prompt with misleading information: ``special`` tokens, and those
    of the ``claim``.
    """

    ids: Mapping[str, Tensor]
    right: int
    wrong: int
    begun: int
    special: Tensor
    claim: Tensor


def read_questions(path: Path | None, count: int = 200) -> list[dict[str, Asked]]:
    """Read the questions of a file, each in both forms; None: ``count`` facts that the demo model knows, in words.

    The form :data:`LETTER` is the published one, with options. In :data:`WORDS` the same question has no options, and
    its answers are their texts. A fact of the demo model comes after a false statement of it.

    Raises:
        OSError, ValueError: as :func:`depass_fast.inputs.records.read_records`; a right option that is none of "A"
            and "B"; a prompt that does not contain the misleading information.
    """
    if path is None:
        return _of_demo(count)
    texts = ("question", "correct_info", "wrong_info", "correct_option", *INFORMATION.values())
    found = []
    for number, one in enumerate(read_records(path, dict.fromkeys(texts, str)), 1):
        place, option = f"{path}, object {number}", one["correct_option"]
        if option not in OPTIONS:
            raise ValueError(f"{place}: the field 'correct_option' is {option!r}, expected 'A' or 'B'.")
        if one["wrong_info"] not in one["prompt_wrong"]:
            raise ValueError(f"{place}: the field 'prompt_wrong' does not contain that of 'wrong_info'.")
        right, wrong = one["correct_info"], one["wrong_info"]
        given = {name: one[field] for name, field in INFORMATION.items()}
        told = {NONE: "", RIGHT: f"Information: {right}\n", WRONG: f"Information: {wrong}\n"}
        asked = {name: f"{PREAMBLE}{text}Question: {one['question']}\nAnswer:" for name, text in told.items()}
        other = OPTIONS[option == OPTIONS[0]]
        found.append({LETTER: Asked(given, wrong, option, other, option), WORDS: Asked(asked, wrong, right, wrong)})
    return found


def _of_demo(count: int) -> list[dict[str, Asked]]:
    """Return held-out facts: the statement of another answer misleads, and that of the right one informs."""
    pairs = demo_prompts("statements", "heldout", language="en")
    found = []
    for true, false in zip(pairs[::2], pairs[1::2], strict=True):
        given = {NONE: "", RIGHT: true.text, WRONG: false.text}
        prompts = {name: f"{text}{false.recall}".strip() for name, text in given.items()}
        found.append({WORDS: Asked(prompts, false.text, true.answer, false.answer)})
    return found[:count]


def encoded(engine: DePass, asked: Asked) -> Encoded | None:
    """Return a question in the engine's tokens; None where an answer is all of the other one's beginning.

    Raises:
        ValueError: the engine has no tokenizer; the claim has no token of its own in its prompt.
    """
    tokenizer: Any = engine.tokenizer
    if tokenizer is None:
        raise ValueError("tokenizer: the questions are texts, and this engine has none; give DePass(model, tokenizer).")
    prompt = asked.prompts[WRONG]
    right, wrong = (following_tokens(tokenizer, f" {answer.strip()}") for answer in (asked.right, asked.wrong))
    begun = _same(right, wrong)
    if begun == min(len(right), len(wrong)):
        return None
    rows = {name: [*tokenizer.encode(text), *right[:begun]] for name, text in asked.prompts.items()}
    row, start = rows[WRONG], prompt.index(asked.claim)
    first, last = (_same(row, tokenizer.encode(prompt[:end])) for end in (start, start + len(asked.claim)))
    if first == last:
        raise ValueError(f"claim: {asked.claim!r} has no token of its own in the prompt {prompt!r}.")
    special = torch.isin(torch.tensor(row), torch.tensor(sorted(set(tokenizer.all_special_ids)), dtype=torch.long))
    claim = torch.zeros(len(row), dtype=torch.bool)
    claim[first:last] = True
    place = engine.adapter.device
    ids = {name: torch.tensor(one, device=place) for name, one in rows.items()}
    return Encoded(ids, right[begun], wrong[begun], begun, special, claim & ~special)


def _same(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many tokens two rows of ids begin with alike."""
    differing = (at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differing, min(len(a), len(b)))
