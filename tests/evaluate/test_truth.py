"""The study of truthfulness: statements and their classifier, questions, scores, masks, and a run on the demo model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from depass_fast import DePass, Tokens
from depass_fast.cli.main import main
from depass_fast.demo import load_demo
from depass_fast.evaluate import statements
from depass_fast.evaluate.interventions import next_logits
from depass_fast.evaluate.methods.base import GRADIENT_INPUT, RANDOM, SHAPLEY, SOFTMAX
from depass_fast.evaluate.probes import last_hidden_states, last_inputs
from depass_fast.evaluate.run import run
from depass_fast.evaluate.statements import Statements, depths, groups_of, held_out_accuracy, read_statements
from depass_fast.evaluate.studies import truth_scores
from depass_fast.evaluate.studies.truth import CLAIM, DELETED, PROMPT, REPLACED, SHARES, SPANS, TruthStudy
from depass_fast.evaluate.studies.truth_questions import (
    LETTER,
    NONE,
    RIGHT,
    WORDS,
    WRONG,
    Encoded,
    encoded,
    read_questions,
)
from depass_fast.evaluate.study import Settings

LAYER = 3


@pytest.fixture(scope="module")
def engine() -> DePass:
    return DePass(*load_demo(), progress=False)


@pytest.fixture(scope="module")
def one(engine) -> Encoded:
    found = encoded(engine, read_questions(None)[0][WORDS])
    assert found is not None
    return found


@pytest.fixture(scope="module")
def truth(engine) -> torch.Tensor:
    return torch.randn(engine.adapter.hidden_size, generator=torch.Generator().manual_seed(0))


def separable(count: int = 80, width: int = 6) -> tuple[Statements, torch.Tensor]:
    """Return statements and hidden states whose first number is above zero for the true ones."""
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(1))
    x[:, 0] += 3 * x[:, 0].sign()
    return Statements.of([f"Number {i} is so." for i in range(count)], (x[:, 0] > 0).long().tolist()), x


# -- statements -----------------------------------------------------------------------------------------------------


def test_a_separable_property_is_held_out_rightly_and_a_permuted_one_by_chance():
    given, x = separable(200)
    assert held_out_accuracy(given, x, seed=0) == 1
    found = statements.truthfulness(given.fit(x, range(200))) * x.std(0)
    assert found[0] > 5 * found[1:].abs().max()
    order = torch.randperm(200, generator=torch.Generator().manual_seed(2))
    assert 0.35 < held_out_accuracy(replace(given, labels=given.labels[order]), x, seed=0) < 0.65


def test_statements_that_share_a_sentence_are_held_out_together():
    texts = ["A is b.", "Statement 1: A is b. Statement 2: C is d.", "E is f.", "C is d. G is h.", "G is h.", "I is j."]
    assert sorted(map(sorted, groups_of(texts))) == [[0, 1, 3, 4], [2], [5]]
    folds = Statements.of(texts, [1, 0, 1, 0, 1, 0]).folds(seed=0)
    assert sorted(map(sorted, folds)) == [[], [], [0, 1, 3, 4], [2], [5]]


def test_folds_are_of_one_size_and_drawn_by_seed():
    given, _ = separable()
    folds = given.folds(seed=0)
    assert sorted(number for fold in folds for number in fold) == list(range(80)) and {len(x) for x in folds} == {16}
    assert folds == given.folds(seed=0) != given.folds(seed=1)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"text": "a", "label": 2}], "object 1: the field 'label' is 2, expected 0 or 1"),
        ([{"text": "a", "label": "1"}], "line 1: the field 'label' is str"),
        ([{"text": f"{i}", "label": 1} for i in range(9)], "9 true and 0 false statements"),
        ([{"text": f"It is. {i}", "label": i % 2} for i in range(20)], "in 1 groups that share no sentence"),
    ],
)
def test_statements_that_teach_nothing_are_refused(tmp_path, records, message):
    path = tmp_path / "statements.json"
    path.write_text(json.dumps(records))
    with pytest.raises(ValueError, match=f"statements.json.*{message}"):
        read_statements(path)


def test_statements_of_a_file_are_read_once_each(tmp_path):
    path = tmp_path / "statements.json"
    path.write_text(json.dumps([{"text": f"This is {i % 12}.", "label": int(i % 12 < 6)} for i in range(24)]))
    found = read_statements(path)
    assert len(found.texts) == 12 and found.labels.tolist() == [1] * 6 + [0] * 6
    assert len(read_statements(path, most=11).texts) == 11


def test_layers_are_parts_of_the_depth():
    assert depths(30, (0.25, 0.5, 0.75)) == [8, 15, 22]
    assert depths(2, (0.0, 0.5, 1.0)) == [1]


def test_the_last_input_is_what_a_trace_records(engine):
    ids = torch.tensor(engine.tokenizer.encode("When Mary and John went to the store"))
    found = last_inputs(engine, ids[None], [2, LAYER])[0]
    trace = engine.trace(ids)
    assert torch.allclose(found, torch.stack([trace.resid(2)[-1], trace.resid(LAYER)[-1]]), atol=1e-5)


# -- questions ------------------------------------------------------------------------------------------------------


def record(**others: str) -> dict[str, str]:
    base = "Question: what?\nOptions: A: this. B: that.\nThe answer is"
    return {
        "prompt_init": base,
        "prompt_correct": f"Information: this.\n{base}",
        "prompt_wrong": f"Information: that.\n{base}",
        "question": "what?",
        "correct_info": "this.",
        "wrong_info": "that.",
        "correct_option": "A",
        **others,
    }


def test_questions_are_read_with_their_options(tmp_path):
    path = tmp_path / "questions.json"
    path.write_text(json.dumps([record(), record(correct_option="B")]))
    first, second = read_questions(path)
    one = first[LETTER]
    assert (one.right, one.wrong, one.option, one.claim) == ("A", "B", "A", "that.")
    assert (second[LETTER].right, second[LETTER].wrong, second[LETTER].option) == ("B", "A", "B")
    assert one.prompts[NONE].startswith("Question") and "this.\n" in one.prompts[RIGHT]
    one = first[WORDS]
    assert (one.right, one.wrong, one.option, one.claim) == ("this.", "that.", None, "that.")
    assert one.prompts[NONE].endswith("the question.\nQuestion: what?\nAnswer:")
    assert one.prompts[WRONG].endswith("Information: that.\nQuestion: what?\nAnswer:")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"correct_option": "C"}, "object 1: the field 'correct_option' is 'C', expected 'A' or 'B'"),
        ({"wrong_info": "another"}, "object 1: the field 'prompt_wrong' does not contain that of 'wrong_info'"),
        ({"prompt_init": ""}, "line 1: the field 'prompt_init' is empty"),
    ],
)
def test_questions_of_another_form_are_refused(tmp_path, changed, message):
    path = tmp_path / "questions.json"
    path.write_text(json.dumps([record(**changed)]))
    with pytest.raises(ValueError, match=f"questions.json.*{message}"):
        read_questions(path)


def test_the_claim_is_found_in_the_tokens(engine):
    asked = read_questions(None)[3][WORDS]
    one = encoded(engine, asked)
    assert one is not None and one.begun == 0
    ids = one.ids[WRONG]
    assert engine.tokenizer.decode(ids[one.claim]).strip() == asked.claim
    assert engine.tokenizer.decode([one.right]) == asked.right != asked.wrong == engine.tokenizer.decode([one.wrong])
    assert one.special.sum() == torch.isin(ids, torch.tensor(engine.tokenizer.all_special_ids)).sum()


def test_answers_are_told_apart_by_the_first_token_that_differs(engine):
    asked = read_questions(None)[0][WORDS]
    longer = replace(asked, right=" the school", wrong=" the park")
    one, short = encoded(engine, longer), encoded(engine, asked)
    assert one is not None and short is not None and one.begun == 1
    the, school = engine.tokenizer.encode(" the school", add_special_tokens=False)
    assert one.right == school and one.ids[NONE].tolist() == [*short.ids[NONE].tolist(), the]
    assert not truth_scores.spans_of(one)[PROMPT][-2:].any() and truth_scores.spans_of(one)[PROMPT][-3]
    assert encoded(engine, replace(longer, wrong=" the")) is None


def test_a_question_needs_a_tokenizer(engine):
    with pytest.raises(ValueError, match="tokenizer"):
        encoded(DePass(engine.model, progress=False), read_questions(None)[0][WORDS])


# -- scores ---------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_their_definitions(engine, one, truth):
    ids = one.ids[WRONG]
    found = truth_scores.scores_of(engine, one, truth, 0.5, LAYER, seed=0)
    assert set(found) == set(truth_scores.METHODS) and {len(x) for x in found.values()} == {len(ids)}
    for rule in (SOFTMAX, SHAPLEY):
        state = engine.decompose(ids, Tokens(), end=LAYER, allocation=rule).dense()[-1, : len(ids)]
        assert torch.allclose(found[rule], -(state @ truth), atol=1e-4)
    resid = engine.trace(ids).resid(LAYER)
    assert torch.allclose(found[truth_scores.OWN_STATE], -(resid @ truth), atol=1e-4)
    logits = next_logits(engine, ids[None])[0]
    assert found[truth_scores.SHAPLEY_OUTPUT].sum() == pytest.approx(
        float(logits[one.wrong] - logits[one.right]), abs=1e-3
    )
    assert found[RANDOM].equal(truth_scores.scores_of(engine, one, truth, 0.5, LAYER, seed=0)[RANDOM])


def test_gradient_times_input_is_that_of_the_embeddings(engine, one, truth):
    found = truth_scores.scores_of(engine, one, truth, 0.5, LAYER, seed=0)[GRADIENT_INPUT]
    inputs = engine.model.get_input_embeddings()(one.ids[WRONG][None]).detach().requires_grad_()
    states = engine.model.model(inputs_embeds=inputs, output_hidden_states=True).hidden_states
    (gradient,) = torch.autograd.grad(states[LAYER][0, -1] @ truth, inputs)
    assert torch.allclose(found, -(inputs * gradient)[0].sum(-1), atol=1e-5)


def test_the_published_scores_are_of_the_claim_alone(engine, one, truth):
    found = truth_scores.scores_of(engine, one, truth, 0.5, LAYER, seed=0)[truth_scores.ALONE]
    ids = one.ids[WRONG]
    assert found.isnan().equal(~one.claim)
    leading = int(one.special.long().cumprod(0).sum())
    alone = torch.cat([ids[:leading], ids[one.claim]])
    state = engine.decompose(alone, Tokens(), end=LAYER).dense()[leading:, leading : len(alone)]  # (n, m, D)
    false = 1 - torch.sigmoid(engine.trace(alone).resid(LAYER)[leading:] @ truth + 0.5)
    expected = torch.einsum("n,nmd,d->m", false / false.sum(), state, truth)
    assert torch.allclose(found[one.claim], -expected, atol=1e-4)


# -- the study ------------------------------------------------------------------------------------------------------


def settings(**others) -> Settings:
    return Settings(prompts=3, quick=True, **others)


def test_margins_are_those_of_masked_prompts(engine, monkeypatch):
    study = TruthStudy(engine, settings())
    item = next(study.items())
    assert item is not None
    one = item.value[2][WORDS]
    ids = one.ids[WRONG]
    n = len(ids)
    order = torch.arange(n, dtype=torch.float32)  # the last tokens go first
    methods = truth_scores.METHODS
    monkeypatch.setattr("depass_fast.evaluate.studies.truth.scores_of", lambda *_: dict.fromkeys(methods, order))
    row = study.measure(item)["forms"][WORDS]

    def margin(left: torch.Tensor) -> float:
        logits = next_logits(engine, left[None])[0]
        return float(logits[one.right] - logits[one.wrong])

    claimed = one.claim.nonzero().flatten()
    for i, share in enumerate(SHARES[CLAIM]):
        gone = claimed[-max(1, round(share * len(claimed))) :]
        stays = torch.ones(n, dtype=torch.bool)
        stays[gone] = False
        assert row["masked"][CLAIM][DELETED][SOFTMAX][i] == pytest.approx(margin(ids[stays]), rel=6e-4)
        filled = ids.clone()
        filled[gone] = study._filler
        assert row["masked"][CLAIM][REPLACED][SOFTMAX][i] == pytest.approx(margin(filled), rel=6e-4)
    count = max(1, round(SHARES[PROMPT][0] * int((~one.special)[:-1].sum())))
    stays = torch.ones(n, dtype=torch.bool)
    stays[n - 1 - count : n - 1] = False  # the last token stays
    assert row["masked"][PROMPT][DELETED][RANDOM][0] == pytest.approx(margin(ids[stays]), rel=6e-4)
    assert row["margins"][WRONG] == pytest.approx(margin(ids), rel=6e-4)


def test_the_classifier_is_of_the_layer_that_tells_held_out_statements_best(engine):
    study = TruthStudy(engine, settings(layers=(1, 4)))
    facts = study.facts()["classifier"]
    assert facts["layer"] == max((1, 4), key=lambda layer: facts["by_layer"][str(layer)])
    assert facts["accuracy"] == facts["by_layer"][str(facts["layer"])] > 0.9
    read = read_statements(None, 100)
    x = last_hidden_states(engine, read.texts, [facts["layer"]])[:, 0]
    truth, bias, _ = study.probe
    assert ((x @ truth + bias > 0) == read.labels.bool()).all()


def made_row(before: float, after: float, option: str) -> dict:
    margins, forms = {NONE: 1.0, RIGHT: 1.0, WRONG: before}, {}
    for form, spans in SPANS.items():
        masked = {
            span: {kind: {m: [after] * len(SHARES[span]) for m in truth_scores.METHODS} for kind in (DELETED, REPLACED)}
            for span in spans
        }
        forms[form] = {"margins": margins, "masked": masked}
    return {"option": option, "forms": forms}


def test_a_summary_follows_from_the_rows(engine):
    study = TruthStudy(engine, settings())
    rows = [made_row(-1.0, 2.0, "A"), made_row(-1.0, -3.0, "A"), made_row(1.0, -2.0, "B"), made_row(2.0, 1.0, "B")]
    summary = study.summary(rows)
    found = summary[LETTER]
    asked = found["asked"][WRONG]
    assert (asked["accuracy"]["mean"], asked["margin"]["mean"], asked["first option"]["mean"]) == (0.5, 0.25, 0.0)
    assert found["asked"][NONE]["first option"]["mean"] == 0.5 and "first option" not in summary[WORDS]["asked"][NONE]
    assert set(found["masked"]) == {CLAIM} and set(summary[WORDS]["masked"]) == {CLAIM, PROMPT}
    step = found["masked"][CLAIM][DELETED][0]
    assert step["share"] == SHARES[CLAIM][0]
    figures = {measure: step[measure][SOFTMAX]["mean"] for measure in ("accuracy", "margin", "corrected", "kept")}
    assert figures == {"accuracy": 0.5, "margin": -0.5, "corrected": 0.5, "kept": 0.5}
    assert step["corrected"][SOFTMAX]["n"] == step["kept"][SOFTMAX]["n"] == 2
    probe = {"statements": 9, "layer": 2, "by_layer": {"2": 0.5}}
    text = "\n".join(table.plain() for table in TruthStudy.tables({"summary": summary, "classifier": probe}))
    assert "answer: letter" in text and "answer: words" in text


def test_a_run_has_tables_and_panels(engine, tmp_path):
    result = run(TruthStudy(engine, settings()), tmp_path / "truth.json", model="demo", progress=False)
    assert json.loads((tmp_path / "truth.json").read_text()) == result
    assert result["asked"] == result["prompts"] == 3 and result["classifier"]["accuracy"] > 0.9
    text = "\n".join(table.plain() for table in TruthStudy.tables(result))
    assert "softmax, claim alone" in text and "nan" not in text
    for panel in TruthStudy.panels(result):
        assert all(len(x) == len(y) == len(panel.lines[RANDOM][0]) for x, y in panel.lines.values())


def test_the_command_runs_it(tmp_path, capsys):
    main(["evaluate", "truth", "--model", "demo", "--quick", "--prompts", "1", "--layers", "2", "--json"])
    assert json.loads(capsys.readouterr().out)["classifier"]["layer"] == 2
