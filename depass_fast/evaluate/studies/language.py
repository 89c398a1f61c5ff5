"""Hidden states split into a subspace of languages and the rest, carried to the end, and both decoded (section 4.3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...components.custom import Subspaces
from ...trace.record import Trace
from ..decoding import part_logits, rank
from ..probes import check_layers, fit_classifier, last_hidden_states
from ..questions import Text, answered, first_token, spaced
from ..statistics import mean
from ..study import Item, Row, Study
from ..tables import Panel, Table
from . import language_report as report
from .language_data import ENGLISH, Case, read_cases, read_training, without, words_of_languages
from .language_report import (
    ANY,
    LANGUAGE,
    MODEL,
    NEAREST,
    RULES,
    SEMANTIC,
    SHUFFLED,
    WORDS,
    part_name,
)

TEXTS, QUICK_TEXTS = 100, 20  # of every language, that the classifier learns from or is tested on
CENTRES, QUICK_CENTRES = 20, 5  # of every language, whose parts make its centroid
WORDS_READ = 10  # of the leading words of a part that are counted
SHOWN = 3  # leading tokens of the language's part in a row
TEXTS_AT_ONCE = 16


@dataclass(frozen=True)
class Space:
    """The place of the states of one part: centroids (C, D) of the languages, and the two main axes (D, 2).

    States count by their direction: they are scaled to length one.
    """

    centroids: Tensor
    middle: Tensor
    axes: Tensor

    @staticmethod
    def of(states: Tensor, labels: Tensor, classes: int) -> Space:
        """Return the space of states (N, D) with labels (N,)."""
        x = torch.nn.functional.normalize(states, dim=-1)
        centroids = torch.stack([x[labels == number].mean(0) for number in range(classes)])
        middle = x.mean(0)
        _, _, axes = torch.linalg.svd(x - middle, full_matrices=False)
        return Space(centroids, middle, axes[:2].T)

    def found(self, state: Tensor, label: int) -> Row:
        """Return whether a state (D,) is nearest to its own language, and its place in the picture."""
        x = torch.nn.functional.normalize(state, dim=-1)
        nearest = int((self.centroids - x).norm(dim=1).argmin())
        return {NEAREST: nearest == label, "at": [round(v, 3) for v in ((x - self.middle) @ self.axes).tolist()]}


class LanguageStudy(Study):
    """The items are the cases whose English prompt the model answers, each in all its languages."""

    name = "language"
    title = "Language subspace"

    languages: list[str]
    layer: int
    bases: Mapping[str, Tensor]
    spaces: Mapping[str, Space]
    answers: Mapping[str, Tensor]  # the first tokens (A,) of all answers in a language
    words: Tensor  # (W,) the tokens that belong to a language
    language_of_word: Tensor  # (W,)
    _classifier: Row

    def items(self) -> Iterator[Item | None]:
        settings, tokenizer = self.settings, self.engine.tokenizer
        if settings.layers is not None:
            check_layers(self.engine, settings.layers)
        texts = read_training(settings.train, settings.seed)
        self.languages = list(texts)
        cases = read_cases(settings.data, self.languages, settings.seed)
        found: list[Item | None] = []
        for case, question in zip(cases, answered(self.engine, [case.texts[ENGLISH] for case in cases]), strict=True):
            found.append(None if question is None else Item(case.key, case))
            if len(found) - found.count(None) == settings.prompts:
                break
        measured = [item.value for item in found if item is not None]
        if measured:
            texts = without(texts, measured)
            self._train(texts)
            self._place(texts)
            words = words_of_languages(tokenizer, texts)
            self.words, self.language_of_word = (
                torch.tensor(list(some), dtype=torch.long) for some in (words, words.values())
            )
            firsts = {name: {self._first(case.texts[name]) for case in cases} for name in self.languages}
            self.answers = {name: torch.tensor(sorted(tokens)) for name, tokens in firsts.items()}
        yield from found

    def depends_on(self) -> Row:
        """The cases that are measured are left out of what the classifier learns from."""
        return {"cases": self.settings.prompts}

    def _first(self, text: Text) -> int:
        """Return the first token of a text's answer."""
        return first_token(self.engine.tokenizer, spaced(*text))

    def _train(self, texts: Mapping[str, Sequence[str]]) -> None:
        """Train the classifier at the best layer in the middle by held-out texts, or at the best of those asked for."""
        count, n_layers = QUICK_TEXTS if self.settings.quick else TEXTS, self.engine.adapter.n_layers
        layers = self.settings.layers or sorted({min(n_layers - 1, round(n_layers * i / 6)) for i in range(1, 6)})
        learnt, held = [], []
        for label, given in enumerate(texts.values()):
            given = given[:count]
            fifth = len(given) // 5
            held += [(text, label) for text in given[:fifth]]
            learnt += [(text, label) for text in given[fifth:]]
        states = last_hidden_states(self.engine, [text for text, _ in learnt + held], layers)
        labels, n = torch.tensor([label for _, label in learnt + held]), len(learnt)
        fits = {layer: fit_classifier(states[:n, i], labels[:n], len(texts)) for i, layer in enumerate(layers)}
        right = {
            layer: (fits[layer].predict(states[n:, i]) == labels[n:]).double().tolist()
            for i, layer in enumerate(layers)
        }
        off = {layer: abs(layer - n_layers / 2) for layer in layers}
        middle = [layer for layer in layers if off[layer] <= n_layers / 6 or self.settings.layers]
        self.layer = max(middle or layers, key=lambda layer: (sum(right[layer]), -off[layer]))
        basis = fits[self.layer].basis()
        shuffled = labels[torch.randperm(n, generator=torch.Generator().manual_seed(self.settings.seed))]
        control = fit_classifier(states[:n, list(layers).index(self.layer)], shuffled, len(texts))
        self.bases = {LANGUAGE: basis, SHUFFLED: control.basis()}
        held_out = {str(layer): mean(values) for layer, values in right.items()}
        self._classifier = {"learnt": n, "layer": self.layer, "rank": basis.shape[1], "held_out": held_out}

    def _place(self, texts: Mapping[str, Sequence[str]]) -> None:
        """Find where the parts of every language lie at the end."""
        count = QUICK_CENTRES if self.settings.quick else CENTRES
        chosen = [(text, label) for label, given in enumerate(texts.values()) for text in given[:count]]
        found: dict[str, list[Tensor]] = {}
        for first in range(0, len(chosen), TEXTS_AT_ONCE):
            trace = self.engine.trace([text for text, _ in chosen[first : first + TEXTS_AT_ONCE]])
            for name, states in self._parts(trace, (LANGUAGE,)).items():
                found.setdefault(name, []).append(states)
        labels = torch.tensor([label for _, label in chosen])
        self.spaces = {name: Space.of(torch.cat(states), labels, len(texts)) for name, states in found.items()}

    def _parts(self, trace: Trace, bases: Sequence[str]) -> dict[str, Tensor]:
        """Return the parts of the normed hidden state at every prompt's last position, (P, D) each, by their names."""
        last = torch.as_tensor(trace.offsets[1:] - 1)
        found = {MODEL: trace.normed_final[last.to(trace.normed_final.device)].float().cpu()}
        for rule in RULES:
            for name in bases:
                subspace = Subspaces(self.layer, [self.bases[name]], labels=[name])
                state = self.engine.decompose(trace, subspace, allocation=rule)
                ends = torch.stack([state.dense(prompt)[-1] for prompt in range(len(last))]).float().cpu()  # (P, M, D)
                if name == SHUFFLED:
                    found[part_name(rule, SHUFFLED)] = ends[:, 1]
                else:
                    found[part_name(rule, LANGUAGE)], found[part_name(rule, SEMANTIC)] = ends[:, 0], ends[:, 1]
        return found

    def measure(self, item: Item) -> Row:
        case: Case = item.value
        trace = self.engine.trace([case.texts[language].prompt for language in self.languages])
        parts = self._parts(trace, (LANGUAGE, SHUFFLED))
        firsts = {language: self._first(case.texts[language]) for language in self.languages}
        row: Row = {}
        for label, language in enumerate(self.languages):
            row[language] = {"same": firsts[language] == firsts[ENGLISH]}
            logits = self._logits({name: states[label] for name, states in parts.items()})
            for name, values in logits.items():
                row[language][name] = self._decoded(values, firsts, language)
                if not name.endswith(SHUFFLED):
                    row[language][name] |= self._language(name, values, parts[name][label], label)
        return {"languages": row}

    def _decoded(self, logits: Tensor, firsts: Mapping[str, int], language: str) -> Row:
        """Return the ranks of the answer and of the English one among all tokens, and among the answers there are."""
        ranks = [
            rank(logits, firsts[name], tokens) for name in (language, ENGLISH) for tokens in (None, self.answers[name])
        ]
        return {"ranks": ranks, ANY: int(logits.argmax()) in firsts.values()}

    def _language(self, name: str, logits: Tensor, state: Tensor, label: int) -> Row:
        """Return what a part says about the language: leading tokens, words, nearest centroid, place."""
        tokenizer: Any = self.engine.tokenizer
        leading = logits.topk(SHOWN if name.endswith(LANGUAGE) else 1).indices.tolist()
        tokens = [tokenizer.decode([token]) for token in leading]
        return {"tokens": tokens, WORDS: self._words(logits, label), **self.spaces[name].found(state, label)}

    def _logits(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the logits (V,) of every part of one hidden state; the model's are its own."""
        others = [name for name in parts if name != MODEL]
        found = part_logits(self.engine, torch.stack([parts[name] for name in others]), parts[MODEL])
        own = self.engine.adapter.logits(parts[MODEL]).float().cpu()
        return {MODEL: own, **dict(zip(others, found, strict=True))}

    def _words(self, logits: Tensor, label: int) -> float | None:
        """Return the part of the leading words, among those that belong to a language, that belong to this one."""
        if len(self.words) <= WORDS_READ:
            return None
        leading = self.language_of_word[logits[self.words].topk(WORDS_READ).indices]
        return round(float((leading == label).float().mean()), 4)

    def summary(self, rows: Sequence[Row]) -> Row:
        return report.summary(rows, self.languages)

    def facts(self) -> Row:
        counts = torch.bincount(self.language_of_word, minlength=len(self.languages)) / max(1, len(self.words))
        by_language = {name: round(float(n), 4) for name, n in zip(self.languages, counts, strict=True)}
        return {"languages": self.languages, "classifier": self._classifier, "words": by_language}

    @staticmethod
    def tables(result: Row) -> list[Table]:
        return report.tables(result)

    @staticmethod
    def panels(result: Row) -> list[Panel]:
        return report.panels(result)
