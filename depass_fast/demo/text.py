"""The generated text of the demo model: entities, facts, sentences, splits. It is deterministic and needs no torch."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from . import lexicon as lx

# The world (entities, facts, splits) never depends on the training seed: a fact stays a fact.
WORLD_SEED = 20240
N_FIRST, N_LAST, N_PAIRED, N_MONONYM = 60, 60, 440, 40
VERDICT_HELDOUT = 0.25  # share of entities about which no statement is ever shown
CLAIMED = "language"  # the relation of the statements whose truth the second phase teaches
PAIR_HELDOUT = 0.10  # share of unordered name pairs never shown

# A training example: pieces of text, each with the loss weight of its tokens.
Example = list[tuple[str, float]]
CONTEXT, ANSWER = 0.1, 1.0
# Kinds of training examples and their shares in percent.
MIX = {"fact": 44, "claim": 20, "ioi": 20, "chat": 6, "plain": 4, "several": 6}


class IoiPrompt(NamedTuple):
    """An indirect-object sentence, cut before the answer; ``corrupted`` repeats neither name (same length)."""

    text: str
    answer: str
    distractor: str
    corrupted: str
    order: str
    template: int


class FactPrompt(NamedTuple):
    """A fact in one language and phrasing, cut before the answer; ``distractor`` answers for another entity."""

    text: str
    answer: str
    distractor: str
    entity: str
    relation: str
    language: str
    phrasing: int


class Statement(NamedTuple):
    """A statement that is true or false (``label``), up to its full stop.

    ``recall`` asks for the same fact in any phrasing: ``text + recall`` is a prompt for the right answer. After it and
    a full stop, ``verdict`` on the statement should follow.
    """

    text: str
    label: bool
    recall: str
    verdict: str
    answer: str
    entity: str
    relation: str
    language: str


class World(NamedTuple):
    """The fixed part of the text: entities, facts ``(entity, relation) -> row of ANSWERS``, and the splits."""

    firsts: tuple[str, ...]
    lasts: tuple[str, ...]
    mononyms: tuple[str, ...]
    entities: tuple[str, ...]
    facts: dict[tuple[str, str], int]
    verdict_heldout: frozenset[str]
    pairs_train: tuple[tuple[str, str], ...]
    pairs_heldout: tuple[tuple[str, str], ...]

    def answer(self, entity: str, relation: str, language: str) -> str:
        """Return the right answer with its leading space."""
        return " " + lx.ANSWERS[relation][self.facts[entity, relation]][lx.LANGUAGES.index(language)]


@lru_cache(maxsize=1)
def world() -> World:
    """Draw the world; a first or last name is shared by several entities, so neither part alone suffices."""
    rng = random.Random(WORLD_SEED)
    firsts = ["".join(p) for p in itertools.product(lx.FIRST_SYLLABLES, lx.SECOND_SYLLABLES)]
    firsts = rng.sample([f for f in firsts if f not in lx.NAMES], N_FIRST)
    short = rng.sample(["".join(p) for p in itertools.product(lx.ONSETS, lx.RIMES)], N_LAST // 2)
    long = rng.sample(["".join(p) for p in itertools.product(lx.STEMS, lx.SUFFIXES)], N_LAST // 2)
    lasts = short + long
    # Walk the (first, last) grid along its diagonals: every part is used about equally often.
    shift = rng.sample(range(N_LAST), -(-N_PAIRED // N_FIRST))
    grid = [f"{firsts[i]} {lasts[(i + s) % N_LAST]}" for s in shift for i in range(N_FIRST)]
    mononyms = ["".join(p) for p in itertools.product(lx.FIRST_SYLLABLES, lx.MONONYM_ENDINGS)]
    mononyms = rng.sample(mononyms, N_MONONYM)
    entities = grid[:N_PAIRED] + mononyms
    rng.shuffle(entities)
    facts = {(e, r): rng.randrange(len(lx.ANSWERS[r])) for e in entities for r in lx.RELATIONS}
    heldout = rng.sample(entities, round(VERDICT_HELDOUT * len(entities)))
    pairs = list(itertools.combinations(lx.NAMES, 2))
    rng.shuffle(pairs)
    cut = round(PAIR_HELDOUT * len(pairs))
    return World(
        tuple(firsts),
        tuple(lasts),
        tuple(mononyms),
        tuple(entities),
        facts,
        frozenset(heldout),
        tuple(pairs[cut:]),
        tuple(pairs[:cut]),
    )


# ------------------------------------------------------------------------------------------------ prompts


def ioi_prompt(rng: random.Random, pairs: tuple[tuple[str, str], ...], heldout_template: bool) -> IoiPrompt:
    """Draw one indirect-object sentence; ``order`` is ABBA (IO first) or BABA (subject first)."""
    templates = lx.HELDOUT_IOI_TEMPLATES if heldout_template else lx.IOI_TEMPLATES
    index = rng.randrange(len(templates))
    a, b = rng.choice(pairs)
    if rng.random() < 0.5:
        a, b = b, a
    order = rng.choice(("ABBA", "BABA"))
    subject, indirect = (b, a) if order == "ABBA" else (a, b)
    third = rng.choice([n for n in lx.NAMES if n not in (a, b)])
    slots = {"A": a, "B": b, "place": rng.choice(lx.PLACES), "object": rng.choice(lx.OBJECTS)}
    text = templates[index].format(S=subject, **slots)
    corrupted = templates[index].format(S=third, **slots)
    return IoiPrompt(text, " " + indirect, " " + subject, corrupted, order, index)


def _other_answer(rng: random.Random, entity: str, relation: str, language: str) -> str:
    """Draw a wrong answer of the same relation, with its leading space."""
    row = rng.randrange(len(lx.ANSWERS[relation]) - 1)
    row += row >= world().facts[entity, relation]
    return " " + lx.ANSWERS[relation][row][lx.LANGUAGES.index(language)]


def fact_prompt(rng: random.Random, entity: str, relation: str, language: str, phrasing: int) -> FactPrompt:
    """Return the fact's prompt; ``rng`` draws only the distractor."""
    text = lx.PHRASINGS[relation, language][phrasing].format(e=entity)
    right = world().answer(entity, relation, language)
    wrong = _other_answer(rng, entity, relation, language)
    return FactPrompt(text, right, wrong, entity, relation, language, phrasing)


def statement(rng: random.Random, entity: str, relation: str, language: str, phrasing: int, label: bool) -> Statement:
    """Return the true statement, or a false one with another answer of the same relation."""
    prompt = fact_prompt(rng, entity, relation, language, phrasing)
    answer = prompt.answer if label else prompt.distractor
    again = rng.choice(lx.PHRASINGS[relation, language]).format(e=entity)
    return Statement(
        text=f"{prompt.text}{answer}.",
        label=label,
        recall=f"{lx.RECALLS[language]} {again}",
        verdict=lx.VERDICTS[language][0 if label else 1],
        answer=answer,
        entity=entity,
        relation=relation,
        language=language,
    )


def claim(
    rng: random.Random, entities: Sequence[str], answers: int, languages: Sequence[str], relation: str = CLAIMED
) -> Statement:
    """Draw a claim about one of ``entities``, true or false by a coin, with one of the first ``answers`` answers."""
    entity = rng.choice(entities)
    while world().facts[entity, relation] >= answers:
        entity = rng.choice(entities)
    language, fact = rng.choice(languages), world().facts[entity, relation]
    label = rng.random() < 0.5
    rows = range(min(answers, len(lx.ANSWERS[relation])))
    row = fact if label else rng.choice([i for i in rows if i != fact])
    answer = " " + lx.ANSWERS[relation][row][lx.LANGUAGES.index(language)]
    true = statement(rng, entity, relation, language, rng.randrange(len(lx.PHRASINGS[relation, language])), True)
    start = true.text.removesuffix(f"{true.answer}.")
    verdict = lx.VERDICTS[language][0 if label else 1]
    return true._replace(text=f"{start}{answer}.", answer=answer, label=label, verdict=verdict)


def ioi_prompts(split: str, count: int, seed: int = 1) -> list[IoiPrompt]:
    """Draw sentences of a split: ``train``, ``heldout_pairs``, ``heldout_templates``, or ``heldout`` (both new)."""
    if split not in ("train", "heldout_pairs", "heldout_templates", "heldout"):
        raise ValueError(f"unknown split of indirect-object sentences: {split!r}")
    pairs = world().pairs_heldout if split in ("heldout", "heldout_pairs") else world().pairs_train
    rng = random.Random(f"ioi-{split}-{seed}")
    return [ioi_prompt(rng, pairs, split in ("heldout", "heldout_templates")) for _ in range(count)]


def _entities(split: str) -> list[str]:
    """Return the entities with statements in the training (``train``), those without (``heldout``), or ``all``."""
    if split not in ("train", "heldout", "all"):
        raise ValueError(f"unknown split of entities: {split!r}")
    held = world().verdict_heldout
    return [e for e in world().entities if split == "all" or (e in held) == (split == "heldout")]


def _languages(language: str | None) -> tuple[str, ...]:
    if language is not None and language not in lx.LANGUAGES:
        raise ValueError(f"unknown language: {language!r}")
    return lx.LANGUAGES if language is None else (language,)


def fact_prompts(split: str = "all", language: str | None = None, seed: int = 1) -> list[FactPrompt]:
    """Return every fact of the split's entities, in every phrasing of the languages."""
    rng = random.Random(f"facts-{seed}")
    return [
        fact_prompt(rng, e, r, lang, p)
        for e in _entities(split)
        for r in lx.RELATIONS
        for lang in _languages(language)
        for p in range(len(lx.PHRASINGS[r, lang]))
    ]


def statements(split: str = "all", language: str | None = None, seed: int = 1) -> list[Statement]:
    """Return a true and a false statement of CLAIMED per entity and language, each in a drawn phrasing."""
    rng = random.Random(f"statements-{split}-{seed}")
    return [
        statement(rng, e, CLAIMED, lang, rng.randrange(len(lx.PHRASINGS[CLAIMED, lang])), label)
        for e in _entities(split)
        for lang in _languages(language)
        for label in (True, False)
    ]


# ------------------------------------------------------------------------------------------ training text


def plain_sentence(rng: random.Random) -> str:
    """Draw a sentence of the small grammar."""
    people = [row[0] for row in lx.ANSWERS["profession"]]
    noun, noun2 = rng.sample(people, 2)
    prep = rng.choice(lx.PREPOSITIONS)
    return rng.choice(lx.PLAIN_TEMPLATES).format(
        adj=rng.choice(lx.ADJECTIVES),
        noun=noun,
        noun2=noun2,
        verb=rng.choice(lx.VERBS),
        adv=rng.choice(lx.ADVERBS),
        prep=prep,
        Prep=prep.capitalize(),
        place=rng.choice(lx.PLACES),
        object=rng.choice(lx.OBJECTS),
    )


def _draw_fact(rng: random.Random, entities: tuple[str, ...]) -> tuple[str, str, str, int]:
    relation, language = rng.choice(lx.RELATIONS), rng.choice(lx.LANGUAGES)
    return rng.choice(entities), relation, language, rng.randrange(len(lx.PHRASINGS[relation, language]))


def training_examples(seed: int, eos: str = "</s>", mix: Mapping[str, int] = MIX) -> Iterator[Example]:
    """Yield training examples without end.

    A statement has no loss, so that a false one is not memorised; the recall after it and the verdict have. No
    statement is about a held-out entity.
    """
    rng = random.Random(f"training-{seed}")
    w = world()
    shown = tuple(e for e in w.entities if e not in w.verdict_heldout)
    kinds, shares = tuple(mix), tuple(mix.values())
    while True:
        kind = rng.choices(kinds, shares)[0]
        if kind == "fact":
            prompt = fact_prompt(rng, *_draw_fact(rng, w.entities))
            yield [(prompt.text, CONTEXT), (prompt.answer, ANSWER), (".", CONTEXT)]
        elif kind == "claim":
            item = statement(rng, *_draw_fact(rng, shown), rng.random() < 0.5)
            right = w.answer(item.entity, item.relation, item.language)
            yield [
                (item.text, 0.0),
                (item.recall, CONTEXT),
                (right, ANSWER),
                (".", CONTEXT),
                (item.verdict, ANSWER),
                (eos, CONTEXT),
            ]
        elif kind == "ioi":
            ioi = ioi_prompt(rng, w.pairs_train, False)
            yield [(ioi.text, CONTEXT), (ioi.answer, ANSWER), (".", CONTEXT), (eos, CONTEXT)]
        elif kind == "chat":
            entity, relation, language, _ = _draw_fact(rng, w.entities)
            question = lx.QUESTIONS[relation, language].format(e=entity)
            answer = w.answer(entity, relation, language)
            yield [(f"user: {question}\nassistant:", 0.0), (answer, ANSWER), ("\n", CONTEXT), (eos, CONTEXT)]
        elif kind == "plain":
            yield [(plain_sentence(rng), CONTEXT), (eos, CONTEXT)]
        else:  # several sentences in a row, so that longer contexts are no surprise
            pieces: Example = []
            for i in range(rng.randint(2, 4)):
                if rng.random() < 0.3:
                    ioi = ioi_prompt(rng, w.pairs_train, False)
                    text, answer = ioi.text, ioi.answer
                else:
                    text, answer = fact_prompt(rng, *_draw_fact(rng, w.entities))[:2]
                pieces += [(" " * (i > 0) + text, 0.0), (answer, ANSWER), (".", 0.0)]
            yield pieces


def vocabulary_text() -> list[str]:
    """Return text whose words become single tokens. Long last names are not among them: they stay stem and suffix."""
    w = world()
    slots: defaultdict[str, str] = defaultdict(str)  # every placeholder becomes empty
    templates = [*lx.IOI_TEMPLATES, *lx.HELDOUT_IOI_TEMPLATES, *lx.PLAIN_TEMPLATES, *lx.QUESTIONS.values()]
    templates += [p for group in lx.PHRASINGS.values() for p in group]
    text = [t.format_map(slots) for t in templates]
    text += [v for pair in lx.VERDICTS.values() for v in pair] + list(lx.RECALLS.values())
    short_lasts = w.lasts[: N_LAST // 2]
    words = [*lx.NAMES, *lx.PLACES, *lx.OBJECTS, *lx.ADJECTIVES, *lx.VERBS, *lx.ADVERBS, *lx.PREPOSITIONS]
    words += [word for rows in lx.ANSWERS.values() for row in rows for word in row]
    words += [*w.firsts, *short_lasts, *w.mononyms, *lx.STEMS]
    text += [" " + word for word in words]
    # Words that also stand at the start of a text, without a space before them.
    text += [*w.firsts, *w.mononyms, *lx.SUFFIXES, *(p.capitalize() for p in lx.PREPOSITIONS)]
    return [*text, "user:", "assistant:", "system:", " user", " assistant", "\n"]
