"""The study of tokens, on a stand-in for the model with known best and worst rankings, and on the demo model."""

from __future__ import annotations

import json
import math

import pytest
import torch

from depass_fast import DePass
from depass_fast.demo import load_demo
from depass_fast.evaluate import comparison, erasure
from depass_fast.evaluate.questions import READS, Question
from depass_fast.evaluate.run import run
from depass_fast.evaluate.studies import token_measures, tokens
from depass_fast.evaluate.studies.token_measures import HIGHER, LDS, area, drawn, fall, lds, measured
from depass_fast.evaluate.study import Settings
from tests.support.family_models import build_model

START, FILLER, TARGET = 1, 2, 5
WORTH = {11: 0.5, 12: 0.3, 13: 0.1, 14: 0.0}  # what a token adds to the answer's probability
IDS = (START, 14, 12, 11, 13)


@pytest.fixture(scope="module")
def engine() -> DePass:
    return DePass(build_model("llama", num_key_value_heads=2), progress=False)


def question() -> Question:
    ids = torch.tensor(IDS)
    return Question(0, "prompt", "answer", ids, TARGET, 6, ids == START)


def probability(row) -> float:
    return 0.05 + sum(WORTH.get(token, 0.0) for token in row)


@pytest.fixture
def ran(monkeypatch) -> list:
    """A stand-in for the model: the probability is a sum over tokens, the logit ten times it. Returns what it ran."""
    rows = []

    def values_after(engine, asked, read):
        rows.extend(dict.fromkeys(asked))
        return {row: [10 * (p := probability(row)), math.log(p), -p] for row in rows}

    monkeypatch.setattr(token_measures, "values_after", values_after)
    monkeypatch.setattr(token_measures, "replacement_id", lambda engine: FILLER)
    return rows


BEST = torch.tensor([9.0, *(WORTH[token] for token in IDS[1:])])
SCORES = {
    **{("best", read): BEST * (-1 if read == "contrast" else 1) for read in READS},
    ("worst", "-"): -BEST,
}


def figures(found, method, read):
    return dict(zip(HIGHER, found.figures[method][read], strict=True))


def test_the_best_ranking_is_best_by_every_measure(engine, ran):
    found = measured(engine, question(), SCORES, 16, seed=0)
    best, worst = figures(found, "best", "log-prob"), figures(found, "worst", "-")
    for name, higher in HIGHER.items():
        assert best[name] > worst[name] if higher else best[name] < worst[name], name
    assert figures(found, "best", "contrast")["disrupt"] == worst["disrupt"]
    assert found.curves.keys() == {"best", "worst"} and found.probability == pytest.approx(0.95)
    assert found.forward_passes == len(ran) == len(set(ran)) and found.run_tokens == sum(map(len, ran))


def test_figures_by_hand(engine, ran):
    """Four tokens may go: 10 to 30 % are one of them, 40 to 60 % two, 70 and 80 % three, 90 and 100 % all."""
    found = figures(measured(engine, question(), SCORES, 16, seed=0), "best", "log-prob")
    without, only = [0.95, 0.45, 0.15, 0.05, 0.05], [0.05, 0.55, 0.85, 0.95, 0.95]
    counts = [1, 1, 1, 2, 2, 2, 3, 3, 4, 4]
    assert found["disrupt"] == pytest.approx(sum(without[n] for n in counts) / 10)
    assert found["recover, replaced"] == pytest.approx(sum(only[n] for n in counts) / 10)
    assert found["comprehensiveness"] == pytest.approx(0.95 - (4 * 0.45 + 0.15) / 5, rel=1e-3)
    assert found["sufficiency"] == pytest.approx(0.95 - (4 * 0.55 + 0.85) / 5, rel=1e-3)
    assert found["deletion"] == pytest.approx((0.95 / 2 + 0.45 + 0.15 + 0.05 + 0.05 / 2) / 4, rel=1e-3)
    assert found["insertion"] == pytest.approx((0.05 / 2 + 0.55 + 0.85 + 0.95 + 0.95 / 2) / 4, rel=1e-3)


def test_lds_of_a_linear_model_is_one(engine, ran):
    found = measured(engine, question(), SCORES, 16, seed=0)
    assert [figures(found, "best", read)[LDS] for read in READS] == pytest.approx([1.0, 1.0, 1.0])
    assert figures(found, "worst", "-")[LDS] == pytest.approx(-1.0)
    assert figures(found, "best", "contrast")["LDS in the log-probability"] == pytest.approx(-1.0)
    kept = drawn(torch.tensor([True, False, False]), 400, seed=3)
    assert kept[:, 0].all() and 0.4 < float(kept[:, 1:].float().mean()) < 0.6
    assert torch.equal(kept, drawn(torch.tensor([True, False, False]), 400, seed=3))
    assert lds(
        torch.tensor([0.0, 2.0, 1.0]), kept, kept.double() @ torch.tensor([0.0, 4.0, 1.0]).double()
    ) == pytest.approx(1.0)


def test_special_tokens_stay_and_one_token_at_least(engine, ran):
    measured(engine, question(), SCORES, 16, seed=0)
    assert all(row[0] == START for row in ran) and (START,) in ran and (START, FILLER, FILLER, FILLER, FILLER) in ran
    bare = erasure.Ranking.of(torch.tensor([14, 12]), torch.tensor([False, False]), torch.tensor([2.0, 1.0]))
    assert [bare.without(count) for count in (1, 2)] == [(12,), (12,)] and bare.only(1) == (14,)
    with pytest.raises(ValueError, match="all of its tokens are special"):
        erasure.Ranking.of(torch.tensor([1]), torch.tensor([True]), torch.tensor([1.0]))


def test_many_tokens_go_by_tenths():
    ranking = erasure.Ranking(tuple(range(25)), tuple(range(25)))
    assert token_measures.steps(ranking) == [0, 2, 5, 8, 10, 12, 15, 18, 20, 22, 25]
    assert erasure.counts_of(token_measures.ERASER, 25) == [1, 1, 2, 5, 12]
    assert area(ranking, [1.0] * 11, 1.0) == pytest.approx(1.0) and fall(ranking, [0.2, 0.4], 1.0) == pytest.approx(0.7)


def test_methods_are_compared_with_the_best_on_the_same_prompts():
    base = [0.1 * i for i in range(20)]
    found = comparison.compared(
        {"low": base, "high": [x + 0.5 for x in base], "near": [x + 0.5 + (-1) ** i for i, x in enumerate(base)],
         "few": [None] * 19 + [0.0], "none": [None] * 20},
        higher=True,
    )  # fmt: skip
    assert found["high"]["from_best"] is None and found["low"]["from_best"]["significant"] is True
    assert (
        found["low"]["from_best"]["mean"] == pytest.approx(-0.5) and found["near"]["from_best"]["significant"] is False
    )
    assert [comparison.leading(found[name]) for name in ("high", "near", "low", "few")] == [True, True, False, False]
    assert comparison.cell(found["high"]).endswith("]*") and comparison.cell(found["none"]) == "-"
    assert comparison.compared({"a": [1.0], "b": [2.0]}, higher=False)["a"]["from_best"] is None
    assert comparison.compared({"a": [None]}, higher=True)["a"]["from_best"] is None
    assert comparison.rounded(0.1234567) == 0.12346 and comparison.rounded(math.nan) is None


def test_a_run_goes_on_and_its_summary_follows_from_its_rows(monkeypatch, tmp_path):
    engine, out, measure = DePass(*load_demo(), progress=False), tmp_path / "tokens.json", tokens.TokenStudy.measure
    monkeypatch.setattr(tokens, "scores_of", few_scores)
    study = tokens.TokenStudy(engine, Settings(prompts=10, quick=True))
    asked = []

    def fails(self, item):
        asked.append(item.key)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return measure(self, item)

    monkeypatch.setattr(tokens.TokenStudy, "measure", fails)
    with pytest.raises(KeyboardInterrupt):
        run(study, out, model="demo", progress=False)
    run(study, out, model="demo", progress=False)
    found = json.loads(out.read_text())
    assert len(asked) == 11 and asked[2] == asked[3] and len(found["rows"]) == 10
    assert study.summary(found["rows"]) == found["summary"]
    every = found["summary"]["methods"]
    assert set(every) == {"half", "order"} and every["half"]["logit"]["disrupt"]["mean"] >= 0
    assert every["half"]["log-prob"]["disrupt"]["mean"] < every["order"]["-"]["disrupt"]["mean"]
    texts = [table.markdown() for table in study.tables(found)]
    assert all("| half |" in text and "| order |" in text for text in texts) and "]* (" in texts[0]
    monkeypatch.setattr(tokens, "PICTURED", ("half", "absent"))
    panels = study.panels(found)
    assert [list(panel.lines) for panel in panels] == [["half"], ["half"]] and panels[0].bands["half"][0][-1] == 100
    assert panels[1].lines["half"][1][-1] == pytest.approx(found["summary"]["probability"]["mean"], rel=1e-2)


def few_scores(engine, question, kinds, *, seed, facts):
    book = engine.ledger(engine.trace(question.ids), question.targets, rule="half").tokens().scores
    n = len(question.ids)
    by_read = {("half", read): one[:n] for read, one in zip(READS, book, strict=True)}
    return {"tokens": {**by_read, ("order", "-"): -torch.arange(n).float()}}
