"""The sums, tables and pictures of the study of languages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..statistics import difference, mean
from ..study import Row
from ..tables import Panel, Table, figure
from .language_data import ENGLISH

RULES = ("softmax", "shapley")
MODEL, LANGUAGE, SEMANTIC, SHUFFLED = "model", "language", "semantic", "shuffled"
# the answer of the prompt's own language, or the English one, leads among all tokens, or among the answers of all cases
RANKS = OWN, OWN_AMONG_ANSWERS, IN_ENGLISH, ENGLISH_AMONG_ANSWERS = (
    "own",
    "own_among_answers",
    "english",
    "english_among_answers",
)  # the order of a row's ranks
ANY, RECIPROCAL, NEAREST, WORDS = "any", "reciprocal_rank", "nearest", "words"
TOP = (OWN, IN_ENGLISH, ANY, OWN_AMONG_ANSWERS, ENGLISH_AMONG_ANSWERS)
FIGURES = (*TOP, RECIPROCAL, NEAREST, WORDS)
MOST_POINTS = 300
COMMON = 5  # leading tokens of a language's part that are shown

NAN = float("nan")


def part_name(rule: str, part: str) -> str:
    """Return the name of a part of the hidden state under a rule."""
    return f"{rule}.{part}"


def summary(rows: Sequence[Row], languages: Sequence[str]) -> Row:
    """Return the means over cases: by language, over all languages, all but English, and translated answers.

    Those are answers of other languages whose first token is not that of the English answer.
    """
    others = [language for language in languages if language != ENGLISH]
    names = [name for name in rows[0]["languages"][ENGLISH] if name != "same"]
    found: Row = {
        "languages": {language: {name: _means(rows, [language], name) for name in names} for language in languages},
        "all": {name: _means(rows, languages, name) for name in names},
        "others": {name: _means(rows, others, name) for name in names},
        "translated": {name: _means(rows, others, name, translated=True) for name in names},
        "translated_prompts": sum(not row["languages"][name]["same"] for row in rows for name in others),
        "against_shuffled": {},
        "tokens": {},
    }
    for rule in RULES:
        a, b = part_name(rule, SEMANTIC), part_name(rule, SHUFFLED)
        found["against_shuffled"][rule] = {
            what: difference(_values(rows, others, a, what, True), _values(rows, others, b, what, True)) for what in TOP
        }
        found["tokens"][rule] = {language: _common(rows, language, part_name(rule, LANGUAGE)) for language in languages}
    return found


def _means(rows: Sequence[Row], languages: Sequence[str], name: str, translated: bool = False) -> Row:
    means = {what: mean(_values(rows, languages, name, what, translated)) for what in FIGURES}
    return {what: one for what, one in means.items() if one["n"] or what in TOP}


def _values(
    rows: Sequence[Row], languages: Sequence[str], name: str, what: str, translated: bool = False
) -> list[float]:
    """Return a figure of every case, its mean over ``languages``; NaN where it has none."""
    found = []
    for row in rows:
        entries = [row["languages"][language] for language in languages]
        values = [_value(entry[name], what) for entry in entries if not (translated and entry["same"])]
        values = [value for value in values if value == value]
        found.append(sum(values) / len(values) if values else NAN)
    return found


def _value(entry: Row, what: str) -> float:
    if what in RANKS:
        return float(entry["ranks"][RANKS.index(what)] == 1)
    if what == RECIPROCAL:
        return 1 / entry["ranks"][0]
    value = entry.get(what)
    return NAN if value is None else float(value)


def _common(rows: Sequence[Row], language: str, name: str) -> list[list[Any]]:
    """Return the tokens that lead most often, each with the part of the prompts where it does."""
    counts = Counter(row["languages"][language][name]["tokens"][0] for row in rows)
    return [[token, round(times / len(rows), 4)] for token, times in counts.most_common(COMMON)]


# -- tables and pictures ---------------------------------------------------------------------------------------------


def tables(result: Row) -> list[Table]:
    """Return the tables of a result."""
    by_rule = [_by_language(result, rule, TOP[:2], "all tokens") for rule in RULES]
    by_rule += [_by_language(result, rule, TOP[3:], "the answers of all cases") for rule in RULES]
    return [_classifier(result), *by_rule, _translated(result), _separation(result), _tokens(result)]


def _classifier(result: Row) -> Table:
    found = result["classifier"]
    return Table(
        "Held-out accuracy of the classifier of languages",
        ("layer", "accuracy"),
        [(str(layer), figure(one)) for layer, one in found["held_out"].items()],
        note=f"It learnt from {found['learnt']} texts. Layer {found['layer']} is taken, its subspace of rank "
        f"{found['rank']}.",
    )


def _by_language(result: Row, rule: str, whats: Sequence[str], place: str) -> Table:
    summed = result["summary"]
    parts = (SEMANTIC, SHUFFLED)
    header = ["language", "model", *(f"{part}: {what}" for part in parts for what in ("own", "English"))]
    rows = []
    for language, means in [*summed["languages"].items(), ("all but English", summed["others"])]:
        cells = [means[part_name(rule, part)][what] for part in parts for what in whats]
        rows.append(
            (language, *map(figure, [means[MODEL][whats[0]], *cells, means[part_name(rule, LANGUAGE)][whats[0]]]))
        )
    return Table(
        f"Answers that lead among {place}, {rule}",
        [*header, f"{LANGUAGE}: own"],
        rows,
        note="The first token of the answer in the prompt's own language, or in English, has the largest logit of a "
        "part. `shuffled` is the control: what is left without the subspace of a classifier that learnt shuffled "
        "labels. The English prompts are those that the model answers.",
    )


def _translated(result: Row) -> Table:
    summed = result["summary"]
    names = [MODEL, *(part_name(rule, part) for rule in RULES for part in (SEMANTIC, SHUFFLED))]
    rows = [(_shown(name), *(figure(summed["translated"][name][what]) for what in TOP)) for name in names]
    for rule in RULES:
        found = summed["against_shuffled"][rule]
        rows.append((f"{rule}: semantic - shuffled", *(figure(found[what]) for what in TOP)))
    return Table(
        "Answers that differ from the English one",
        ("decoded", "own", "English", "any language's", "own, among answers", "English, among answers"),
        rows,
        note=f"The {summed['translated_prompts']} prompts in other languages whose answer begins with another token "
        "than the English one.",
    )


def _separation(result: Row) -> Table:
    summed, words = result["summary"]["all"], result["words"].values()
    names = [MODEL, *(part_name(rule, part) for rule in RULES for part in (LANGUAGE, SEMANTIC))]

    def shown(name: str, what: str) -> str:
        return figure(summed[name][what]) if what in summed[name] else "-"

    return Table(
        "Languages in the parts at the end",
        ("part", "nearest centroid", "words of the language", "reciprocal rank of the answer"),
        [(_shown(name), *(shown(name, what) for what in (NEAREST, WORDS, RECIPROCAL))) for name in names],
        note="The nearest centroid of training texts is that of the prompt's language (by chance: one of "
        f"{len(result['languages'])}). Of a part's ten leading words, those that belong to the prompt's language (by "
        f"chance: {min(words):.0%} to {max(words):.0%}).",
    )


def _tokens(result: Row) -> Table:
    found = result["summary"]["tokens"]
    rows = [
        (
            language,
            *(", ".join(f"{_code(token)} {part:.0%}" for token, part in found[rule][language]) for rule in RULES),
        )
        for language in result["languages"]
    ]
    return Table("Tokens that lead the language's part", ("language", *RULES), rows, left=3)


def _code(token: str) -> str:
    """Return a token as code in Markdown."""
    around = "``" if "`" in token else "`"
    return f"{around}{token!r}{around}"


def _shown(name: str) -> str:
    rule, _, part = name.partition(".")
    return f"{rule}: {part}" if part else "model"


def panels(result: Row) -> list[Panel]:
    """Return the main axes of the hidden states and of both parts at the end, coloured by language."""
    rule = RULES[0]
    titles = {MODEL: "hidden states", part_name(rule, LANGUAGE): "language part"}
    titles[part_name(rule, SEMANTIC)] = "semantic part"
    rows = result["rows"][: MOST_POINTS // len(result["languages"])]
    found = []
    for name, title in titles.items():
        points = {}
        for language in result["languages"]:
            places = [row["languages"][language][name]["at"] for row in rows]
            points[language] = [x for x, _ in places], [y for _, y in places]
        found.append(Panel(title, "first axis", "second axis", points=points))
    return found
