"""The study of rules, on a stand-in for the model with known best and worst rankings, and on the demo model."""

from __future__ import annotations

import json

import pytest
import torch

from depass_fast import DePass, Tokens
from depass_fast.demo import load_demo
from depass_fast.evaluate.masking import Effect
from depass_fast.evaluate.methods import base
from depass_fast.evaluate.methods.shares import shares
from depass_fast.evaluate.questions import READS, Question
from depass_fast.evaluate.run import run
from depass_fast.evaluate.studies import rules
from depass_fast.evaluate.study import Settings
from tests.support.family_models import build_model
from tests.support.models import random_ids


@pytest.fixture(scope="module")
def engine() -> DePass:
    return DePass(build_model("llama", num_key_value_heads=2), progress=False)


def question(engine) -> Question:
    ids = torch.tensor(random_ids(6))
    return Question(0, "prompt", "answer", ids, 5, 6, torch.zeros(6, dtype=torch.bool))


def test_masks_tell_the_best_ranking_from_the_worst(monkeypatch, engine):
    """A stand-in for the model: it answers rightly as long as half of the heads of layer 0 write."""
    ran = []

    def effects(engine, question, masks, kind):
        ran.extend(masks)
        return [Effect(int(mask[0].sum()) <= 2, 0.0, 0.0) for mask in masks]

    monkeypatch.setattr(rules, "effects", effects)
    best = torch.tensor([[4.0, 5.0, 6.0, 7.0], [1.0, 1.5, 2.0, 3.0], [0.1, 0.2, 0.3, 0.4]])
    scores = {"best": {("x", "log-prob"): best, ("x", "logit"): -best}, "worst": {("y", "log-prob"): -best}}
    found = rules.masked(engine, question(engine), base.HEADS, scores)
    assert found["best"]["heads, lowest, signed"] == "11111" and found["worst"]["heads, lowest, signed"] == "11000"
    assert found["best"]["heads, highest, signed"] == "11110" and found["worst"]["heads, highest, signed"] == "11111"
    assert found["best"]["heads, lowest, by size"] == found["worst"]["heads, lowest, by size"] == "11111"
    assert len(ran) == 2 * 2 * 10 and all(mask.shape == (3, 4) for mask in ran)


def test_the_temperature_is_that_of_the_softmax(engine):
    one = question(engine)
    trace = engine.trace(one.ids)
    for rule, temperature in ((base.SOFTMAX, 0.1), (base.SOFTMAX, 3.0), (base.RELU, None)):
        subject = base.Subject(engine, one, trace, (base.TOKENS,), (rule,))
        found = shares(subject, rule, temperature)[base.TOKENS]
        given = {} if temperature is None else {"temperature": temperature}
        expected = engine.attribute(trace, Tokens(), one.targets, method="exact", allocation=rule, **given).scores
        for read, scores in zip(READS, expected, strict=True):
            torch.testing.assert_close(found[rule, read], scores)


def test_every_rule_is_there_and_the_softmax_at_every_temperature():
    found = rules.variants((0.1, 10.0))
    assert [one.name for one in found[:2]] == ["softmax, T = 0.1", "softmax, T = 10"] and len(found) == 8
    assert all((base.NEURONS in one.kinds) == (one.rule not in ("linear", "relu", "max")) for one in found)


def test_neurons_of_experts_are_left_out():
    engine = DePass(build_model("mixtral"), progress=False)
    study = rules.RuleStudy(engine, Settings(quick=True))
    assert study._kinds(question(engine)) == ["tokens", "heads"] and "mixture of experts" in study.facts()["no_neurons"]


def test_a_run_goes_on_and_its_tables_follow_from_its_rows(monkeypatch, tmp_path):
    engine, out, measure = DePass(*load_demo(), progress=False), tmp_path / "rules.json", rules.RuleStudy.measure
    monkeypatch.setattr(rules, "FEW_TEMPERATURES", (0.1,))
    study, asked = rules.RuleStudy(engine, Settings(prompts=2, quick=True)), []

    def fails(self, item):
        asked.append(item.key)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return measure(self, item)

    monkeypatch.setattr(rules.RuleStudy, "measure", fails)
    with pytest.raises(KeyboardInterrupt):
        run(study, out, model="demo", progress=False)
    run(study, out, model="demo", progress=False)
    found = json.loads(out.read_text())
    assert len(asked) == 3 and asked[1] == asked[2] and study.summary(found["rows"]) == found["summary"]
    at = found["measures"].index("heads, lowest, signed")
    digits = [row["figures"]["shapley"][at] for row in found["rows"]]
    assert all(len(each) == 5 and set(each) <= {"0", "1"} for each in digits)
    expected = sum(map(int, "".join(digits))) / 10
    assert found["summary"]["shapley"]["heads, lowest, signed"]["mean"] == pytest.approx(expected)
    main, more = (table.markdown() for table in study.tables(found))
    assert "| softmax, T = 0.1 |" in main and "Neurons: on 2 prompts." in main and " / " in more
    assert next(line for line in main.splitlines() if line.startswith("| relu")).endswith("| - | - |")
    panels = study.panels(found)
    assert len(panels) == 3 and all(panel.log_x for panel in panels)
    assert list(panels[0].lines) == [
        "softmax, disrupt ↓",
        "softmax, recover ↑",
        "shapley, disrupt ↓",
        "shapley, recover ↑",
    ]


def test_few_prompts_have_their_neurons_ranked(engine):
    study = rules.RuleStudy(engine, Settings())
    ranked = [i for i in range(9) if base.NEURONS in study._kinds(numbered(engine, i))]
    assert ranked == [0, 2, 4, 6, 8]


def numbered(engine, number) -> Question:
    one = question(engine)
    return Question(number, *(getattr(one, name) for name in ("prompt", "answer", "ids", "target", "foil", "special")))
