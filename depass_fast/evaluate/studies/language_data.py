"""Cases in several languages, the texts that a classifier of languages learns from, and the words of each language."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...demo import FactPrompt, demo_prompts
from ...inputs.records import read_records
from ..questions import Text

LANGUAGES = ("English", "French", "German", "Italian", "Portuguese", "Spanish")  # in the order of their labels
ENGLISH = LANGUAGES[0]
DEMO = {"en": "English", "fr": "French", "de": "German"}
FEWEST_TEXTS = 5  # of a language, as every fifth is held out
SEEN, OWN = 3, 0.5  # how often a word is seen, and the part of it in one language from which on it belongs there


@dataclass(frozen=True)
class Case:
    """One fact: its prompt and answer by language. ``key`` tells it from the others."""

    key: str
    texts: Mapping[str, Text]


def read_cases(path: Path | None, languages: Sequence[str], seed: int) -> list[Case]:
    """Read the cases of a file, "original" being English, or the demo model's facts of held-out entities.

    Raises:
        OSError, ValueError: as :func:`depass_fast.inputs.records.read_records`.
    """
    if path is None:
        return _demo_cases(seed)
    names = {language: "original" if language == ENGLISH else language for language in languages}
    inside = {"prompt": str, "answer": str}
    records = read_records(path, {name: inside for name in names.values()})
    return [
        Case(
            str(number),
            {language: Text(one[name]["prompt"], one[name]["answer"]) for language, name in names.items()},
        )
        for number, one in enumerate(records)
    ]


def _demo_cases(seed: int) -> list[Case]:
    rng = random.Random(f"language-{seed}")
    by_fact: dict[tuple[str, str], dict[str, list[FactPrompt]]] = defaultdict(lambda: defaultdict(list))
    for one in demo_prompts("facts", "heldout"):
        by_fact[one.entity, one.relation][DEMO[one.language]].append(one)
    drawn = rng.sample(sorted(by_fact), 200)
    cases = []
    for number, fact in enumerate(drawn):
        phrased = {language: rng.choice(found) for language, found in by_fact[fact].items()}
        cases.append(Case(str(number), {name: Text(one.text, one.answer) for name, one in phrased.items()}))
    return cases


def read_training(path: Path | None, seed: int) -> dict[str, list[str]]:
    """Read the texts of every language, in an order drawn by ``seed``; the demo model's own facts without a file.

    Raises:
        OSError, ValueError: as :func:`depass_fast.inputs.records.read_records`; a label that is none of 0 to 5; fewer
            than two languages.
    """
    found: dict[str, list[str]] = defaultdict(list)
    if path is None:
        for one in demo_prompts("facts", "train"):
            found[DEMO[one.language]].append(one.text)
    else:
        for one in read_records(path, {"text": str, "label": int}):
            if not 0 <= one["label"] < len(LANGUAGES):
                known = ", ".join(f"{i} ({name})" for i, name in enumerate(LANGUAGES))
                raise ValueError(f"{path}: the label {one['label']} of {one['text']!r} is none of {known}.")
            found[LANGUAGES[one["label"]]].append(one["text"])
    if len(found) < 2 or ENGLISH not in found:
        raise ValueError(f"{path}: its texts are {' and '.join(found)}; expected English and at least one more.")
    rng = random.Random(f"language-{seed}")
    ordered = {name: list(dict.fromkeys(found[name])) for name in LANGUAGES if name in found}
    return {name: rng.sample(texts, len(texts)) for name, texts in ordered.items()}


def without(texts: Mapping[str, Sequence[str]], measured: Sequence[Case]) -> dict[str, list[str]]:
    """Return the texts of every language without the prompts that are measured.

    Raises:
        ValueError: fewer than :data:`FEWEST_TEXTS` of a language are left.
    """
    prompts = {text.prompt for case in measured for text in case.texts.values()}
    left = {language: [text for text in given if text not in prompts] for language, given in texts.items()}
    for language, given in left.items():
        if len(given) < FEWEST_TEXTS:
            raise ValueError(
                f"train: it has {len(given)} texts in {language} that are not among the prompts, expected "
                f"{FEWEST_TEXTS} at least. Give more texts, or fewer --prompts."
            )
    return left


def words_of_languages(tokenizer: Any, texts: Mapping[str, Sequence[str]]) -> dict[int, int]:
    """Return the tokens that belong to a language, by its number: seen often enough, and mostly in its texts.

    A token's part in a language is that of its rates in the texts of all languages.
    """
    counts, rates = Counter(), defaultdict(dict)
    for number, given in enumerate(texts.values()):
        tokens = Counter(token for text in given for token in set(tokenizer.encode(text, add_special_tokens=False)))
        counts.update(tokens)
        for token, times in tokens.items():
            rates[token][number] = times / len(given)
    found = {}
    for token, times in counts.items():
        number, rate = max(rates[token].items(), key=lambda one: one[1])
        if times >= SEEN and rate > OWN * sum(rates[token].values()):
            found[token] = number
    return found
