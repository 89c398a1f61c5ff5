"""The study of languages: its files, its classifier and control, its figures from its rows, its picture."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from depass_fast import DePass
from depass_fast.demo import load_demo
from depass_fast.evaluate import plot
from depass_fast.evaluate.decoding import rank
from depass_fast.evaluate.interventions import next_logits
from depass_fast.evaluate.questions import Text
from depass_fast.evaluate.run import run
from depass_fast.evaluate.studies import language_report as report
from depass_fast.evaluate.studies.language import LanguageStudy, Space
from depass_fast.evaluate.studies.language_data import (
    LANGUAGES,
    Case,
    read_cases,
    read_training,
    without,
    words_of_languages,
)
from depass_fast.evaluate.study import Settings

THREE = ["English", "French", "German"]


@pytest.fixture(scope="module")
def engine() -> DePass:
    return DePass(*load_demo(), progress=False)


@pytest.fixture(scope="module")
def measured(engine):
    study = LanguageStudy(engine, Settings(prompts=2, quick=True))
    return study, run(study, model="demo", progress=False)


# -- files ----------------------------------------------------------------------------------------------------------


def write(path, values):
    path.write_text("\n".join(json.dumps(value) for value in values))
    return path


def case(english: str, french: str, **changes):
    return {"original": {"prompt": english, "answer": "x"}, "French": {"prompt": french, "answer": "y"}, **changes}


def test_cases_are_read_in_the_languages_asked_for(tmp_path):
    path = write(tmp_path / "cases.json", [case("A is", "A est"), case("B is", "B est", German={"prompt": "B ist"})])
    cases = read_cases(path, ["English", "French"], 0)
    assert [one.key for one in cases] == ["0", "1"]
    assert cases[1].texts == {"English": ("B is", "x"), "French": ("B est", "y")}
    with pytest.raises(ValueError, match=r"cases.json, line 1: the field 'German' is missing"):
        read_cases(path, THREE, 0)
    write(path, [case("A is", "A est"), case("B is", "B est", French={"prompt": "B est"})])
    with pytest.raises(ValueError, match=r"cases.json, line 2, in 'French': the field 'answer' is missing"):
        read_cases(path, ["English", "French"], 0)


def test_training_texts_are_drawn_once_each_by_the_seed(tmp_path):
    texts = [{"text": f"{name} {i}", "label": label} for label, name in enumerate(LANGUAGES[:3]) for i in range(9)]
    path = write(tmp_path / "train.json", [*texts, texts[0]])
    found = read_training(path, 0)
    assert list(found) == THREE and all(len(set(given)) == len(given) == 9 for given in found.values())
    assert found == read_training(path, 0) and found != read_training(path, 1)
    with pytest.raises(ValueError, match=r"the label 6 of 'a' is none of 0 \(English\), 1 \(French\)"):
        read_training(write(path, [{"text": "a", "label": 6}]), 0)
    with pytest.raises(ValueError, match="its texts are French; expected English and at least one more"):
        read_training(write(path, [{"text": "a", "label": 1}]), 0)


def test_measured_prompts_are_not_learnt_from():
    texts = {"English": [f"e{i}" for i in range(7)], "French": [f"f{i}" for i in range(7)]}
    cases = [Case("0", {"English": Text("e3", "x"), "French": Text("f0", "y")})]
    assert without(texts, cases) == {"English": ["e0", "e1", "e2", "e4", "e5", "e6"], "French": texts["French"][1:]}
    with pytest.raises(ValueError, match="train: it has 4 texts in French that are not among the prompts, expected 5"):
        without({**texts, "French": texts["French"][:5]}, cases)


def test_words_belong_to_the_language_where_they_are_seen():
    ids = {"a": 1, "le": 2, "the": 3, "rare": 4, "both": 5}
    tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: [ids[word] for word in text.split()])
    texts = {"English": ["the both", "the both a", "the both rare"], "French": ["le le both", "le both", "le both a"]}
    assert words_of_languages(tokenizer, texts) == {3: 0, 2: 1}  # "a" and "rare" are too rare, "both" is evenly spread


# -- the study ------------------------------------------------------------------------------------------------------


def test_parts_sum_to_the_hidden_state_and_the_model_is_itself(engine, measured):
    study, result = measured
    prompt = study_case(study, result).texts["French"].prompt
    trace = engine.trace([prompt])
    parts = study._parts(trace, ("language", "shuffled"))
    for rule in report.RULES:
        whole = parts[f"{rule}.language"] + parts[f"{rule}.semantic"]
        torch.testing.assert_close(whole, parts["model"], atol=1e-4, rtol=1e-4)
        assert not torch.equal(parts[f"{rule}.shuffled"], parts[f"{rule}.semantic"])
    logits = study._logits({name: states[0] for name, states in parts.items()})
    own = next_logits(engine, torch.tensor([engine.tokenizer.encode(prompt)]))[0]
    torch.testing.assert_close(logits["model"], own, atol=1e-3, rtol=1e-4)
    torch.testing.assert_close(logits["shapley.language"] + logits["shapley.semantic"], own, atol=1e-3, rtol=1e-4)


def study_case(study, result) -> Case:
    cases = read_cases(None, study.languages, 0)
    return next(case for case in cases if case.key == result["rows"][0]["key"])


def test_a_row_has_the_ranks_of_the_models_own_logits(engine, measured):
    study, result = measured
    texts, row = study_case(study, result).texts, result["rows"][0]["languages"]
    for language in THREE:
        encode = engine.tokenizer.encode
        logits = next_logits(engine, torch.tensor([encode(texts[language].prompt)]))[0]
        first, english = (encode(texts[name].answer, add_special_tokens=False)[0] for name in (language, "English"))
        ranks = row[language]["model"]["ranks"]
        assert ranks[0] == rank(logits, first) and ranks[2] == rank(logits, english)
        assert ranks[1] <= ranks[0] and ranks[3] <= ranks[2]
        assert row[language]["same"] == (first == english)
    assert row["English"]["model"]["ranks"] == [1, 1, 1, 1]  # the cases are those that the model answers


def test_the_classifier_is_better_than_chance_and_its_control_is_of_its_rank(measured):
    study, result = measured
    found = result["classifier"]
    assert result["languages"] == THREE and found["learnt"] == 48 and found["rank"] == 2
    assert set(found["held_out"]) == {"1", "2", "3", "4", "5"} and found["layer"] == study.layer in (2, 3, 4)
    assert all(one["n"] == 12 and one["mean"] > 0.6 for one in found["held_out"].values())
    assert study.bases["language"].shape[1] == study.bases["shuffled"].shape[1] == 2


def test_layers_that_are_asked_for_are_the_choice(engine):
    study = LanguageStudy(engine, Settings(prompts=1, quick=True, layers=(1,)))
    next(study.items())
    assert study.layer == 1
    study = LanguageStudy(engine, Settings(prompts=1, quick=True, layers=(9,)))
    with pytest.raises(ValueError, match="layers: 9 is no layer; the model has layers 0 to 5"):
        next(study.items())


def test_the_summary_follows_from_the_rows(measured):
    _, result = measured
    whole = json.loads(json.dumps(result))
    assert report.summary(whole["rows"], whole["languages"]) == whole["summary"]


def entry(own: int, english: int, **more):
    return {"ranks": [own, min(own, 3), english, 1], "any": own == 1, **more}


def test_sums_are_means_over_cases():
    names = [
        report.MODEL,
        *(report.part_name(r, p) for r in report.RULES for p in ("language", "semantic", "shuffled")),
    ]
    extra = {"tokens": ["le"], "words": 0.5, "nearest": True, "at": [0.0, 0.0]}

    def row(french: tuple[int, int], same: bool):
        made: dict[str, Any] = {"English": {"same": True}, "French": {"same": same}}
        for name in names:
            more = {} if name.endswith("shuffled") else extra
            made["English"][name] = entry(1, 1, **more)
            made["French"][name] = entry(*french, **more)
        made["French"]["shapley.shuffled"] = entry(5, 5)
        return {"languages": made}

    found = report.summary([row((1, 2), False), row((4, 1), False), row((1, 1), True)], ["English", "French"])
    french = found["languages"]["French"]["shapley.semantic"]
    assert french["own"]["mean"] == pytest.approx(2 / 3) and french["english"]["mean"] == pytest.approx(2 / 3)
    assert french["own_among_answers"]["mean"] == pytest.approx(2 / 3) and french["english_among_answers"]["mean"] == 1
    assert french["reciprocal_rank"]["mean"] == pytest.approx((1 + 1 / 4 + 1) / 3)
    assert found["translated"]["shapley.semantic"]["own"]["mean"] == 0.5
    assert found["translated_prompts"] == 2 and found["translated"]["model"]["own"]["n"] == 2
    assert found["all"]["model"]["own"]["mean"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert found["against_shuffled"]["shapley"]["own"]["mean"] == 0.5
    assert found["tokens"]["softmax"]["French"] == [["le", 1.0]]


def test_the_space_of_a_part_knows_its_languages():
    states = torch.tensor([[3.0, 0.1, 0], [1, 0, 0.1], [0.1, 2, 0], [0, 5, 0.2]])
    space = Space.of(states, torch.tensor([0, 0, 1, 1]), 2)
    found = [space.found(state, label) for state, label in zip(states, (0, 0, 1, 0), strict=True)]
    assert [one["nearest"] for one in found] == [True, True, True, False]
    assert (found[0]["at"][0] > 0) == (found[1]["at"][0] > 0) != (found[2]["at"][0] > 0)


# -- tables and the picture -----------------------------------------------------------------------------------------


def test_tables_are_of_the_result_alone(measured):
    _, result = measured
    tables = LanguageStudy.tables(json.loads(json.dumps(result)))
    assert len(tables) == 8
    for table in tables:
        assert all(len(row) == len(table.header) for row in table.rows)
        assert "None" not in table.plain() and "nan" not in table.plain()


def test_bars_and_backticks_of_tokens_stay_inside_their_cells(measured):
    _, result = measured
    tokens = {rule: {language: [["a|`", 1.0]] for language in THREE} for rule in report.RULES}
    table = report.tables({**result, "summary": {**result["summary"], "tokens": tokens}})[-1]
    assert "``'a\\|`'`` 100%" in table.markdown() and "``'a|`'`` 100%" in table.plain()


def test_the_picture_has_a_point_for_every_prompt(measured, tmp_path):
    pytest.importorskip("matplotlib")
    _, result = measured
    panels = LanguageStudy.panels(result)
    assert [panel.title for panel in panels] == ["hidden states", "language part", "semantic part"]
    for panel in panels:
        assert list(panel.points) == THREE and all(len(x) == len(y) == 2 for x, y in panel.points.values())
    plot.draw(panels, tmp_path / "a.svg")
    drawn = (tmp_path / "a.svg").read_text()
    assert "French" in drawn and "first axis" in drawn
