"""The study `components`: its masks, CPR and CMD, what it compares, and a run that goes on."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from depass_fast import DePass
from depass_fast.demo import load_demo
from depass_fast.evaluate import masking
from depass_fast.evaluate.circuits import KEPT, cmd, cpr, kept_masks
from depass_fast.evaluate.comparison import compared, compared_of_means
from depass_fast.evaluate.interventions import HEADS, NEURONS, masked_logits, widths
from depass_fast.evaluate.masking import BY_SIZE, HIGHEST, LOWEST, SIGNED, effects, end_masks
from depass_fast.evaluate.methods.base import ATTN_LRP, HALF, NORM, PUBLISHED_NORM, RANDOM, SHAPLEY, SOFTMAX
from depass_fast.evaluate.questions import CONTRAST, LOG_PROB, READS, Question, answered, read_texts
from depass_fast.evaluate.run import run
from depass_fast.evaluate.statistics import of_means
from depass_fast.evaluate.studies import components
from depass_fast.evaluate.studies.components import COMPARED, SHARES, ComponentStudy, planned
from depass_fast.evaluate.study import Item, Settings
from tests.support.family_models import build_model
from tests.support.models import random_ids


@pytest.fixture(scope="module")
def engine() -> DePass:
    return DePass(*load_demo(), progress=False)


@pytest.fixture(scope="module")
def question(engine) -> Question:
    found = next(answered(engine, read_texts(None)))
    assert found is not None
    return found


def stand_in(engine, question, kinds, *, seed, only):
    """Random scores in the form of `scores_of`; AttnLRP does not go with this model."""
    if list(only) == [ATTN_LRP]:
        raise ValueError("AttnLRP: not here.")
    found = {}
    for kind in kinds:
        shape, draw = (engine.adapter.n_layers, widths(engine, kind)[0]), torch.Generator().manual_seed(seed)
        found[kind] = {
            (method, read): torch.rand(shape, generator=draw) - (0 if read == "-" else 0.5)
            for method in only
            for read in (("-",) if method in (NORM, PUBLISHED_NORM, RANDOM) else READS)
        }
    return found


@pytest.fixture
def cheap(monkeypatch):
    """The scores are random, the methods two, and nothing runs but every mask, which is counted."""
    monkeypatch.setattr(components, "scores_of", stand_in)
    monkeypatch.setattr(components, "COMPARED", (SHAPLEY, RANDOM))
    counted = []

    def once(engine, ids, masks, kind):
        counted.append(masks)
        return torch.randn(len(masks), engine.model.config.vocab_size, generator=torch.Generator().manual_seed(0))

    monkeypatch.setattr(masking, "masked_logits", once)
    return counted


# -- masks ------------------------------------------------------------------------------------------------------------


def test_either_end_is_masked():
    order = torch.tensor([3, 1, 0, 2])
    found = [(end, mask.tolist()) for end, mask in end_masks(order, {LOWEST: (0.01, 0.5), HIGHEST: (0.25, 0.75)})]
    assert found == [
        (LOWEST, [False, False, False, True]),  # one at least
        (LOWEST, [False, True, False, True]),
        (HIGHEST, [False, False, True, False]),
        (HIGHEST, [True, True, True, False]),
    ]


def test_the_top_is_kept():
    order = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    masks = list(kept_masks(order))
    assert [500 - int(mask.sum()) for mask in masks] == [0, 1, 2, 5, 10, 25, 50, 100, 250, 500]
    assert all(not mask[order[-int(share * 500) :]].any() for share, mask in zip(KEPT[1:], masks[1:], strict=True))


def test_the_plan_asks_every_method_for_what_it_is_compared_in():
    draw = torch.Generator().manual_seed(0)
    names = [
        *((SOFTMAX, read) for read in READS),
        *((HALF, read) for read in READS),
        (NORM, "-"),
        (PUBLISHED_NORM, "-"),
    ]
    scores = {name: torch.randn(2, 50, generator=draw) for name in names}
    plan = planned(scores, HEADS)
    masked = {place[1] for place in plan if place[0] == "masked"}
    kept = {place[1] for place in plan if place[0] == "kept"}
    assert masked == {"softmax, log-prob", "softmax, logit", "half, log-prob", NORM, PUBLISHED_NORM}
    assert kept == {"softmax, contrast", "half, contrast", NORM}
    assert plan["nothing",][0].all()
    signed, by_size = (plan["masked", "softmax, log-prob", ranking, HIGHEST] for ranking in (SIGNED, BY_SIZE))
    one = scores[SOFTMAX, LOG_PROB].flatten()
    assert [int(mask.sum()) for mask in signed] == [2, 10, 30] == [int(mask.sum()) for mask in by_size]
    assert one[signed[1]].min() > one[~signed[1]].max() and one[by_size[1]].abs().min() > one[~by_size[1]].abs().max()
    assert ("masked", NORM, SIGNED, LOWEST) not in plan


def test_effects_are_those_of_the_masked_model(engine, question, monkeypatch):
    shape = (engine.adapter.n_layers, widths(engine, HEADS)[0])
    masks = list(torch.rand(3, *shape, generator=torch.Generator().manual_seed(0)) < 0.2)
    monkeypatch.setattr(masking, "_AT_ONCE", 2)
    counted = []
    monkeypatch.setattr(masking, "masked_logits", lambda *given: counted.append(len(given[2])) or masked_logits(*given))
    found = effects(engine, question, [*masks, masks[1].clone(), masks[0]], HEADS)
    assert sum(counted) == 3 and found[3] == found[1] and found[4] == found[0]
    for mask, one in zip(masks, found, strict=False):
        (logits,) = masked_logits(engine, question.ids, mask[None], HEADS)
        assert one.right == (int(logits.argmax()) == question.target)
        assert one.probability == pytest.approx(float(logits.softmax(-1)[question.target]), rel=1e-4)
        assert one.lead == pytest.approx(float(logits[question.target] - logits[question.foil]), rel=1e-4, abs=1e-4)


# -- CPR and CMD ------------------------------------------------------------------------------------------------------


def additive(effects: torch.Tensor, order: torch.Tensor, nothing: float = -2.0) -> np.ndarray:
    """The leads of a model whose nodes add up: of the whole, of nothing, and of what is kept."""
    kept = [nothing + float(effects[~mask].sum()) for mask in kept_masks(order)]
    return np.array([nothing + float(effects.sum()), nothing, *kept])


def test_areas_of_an_additive_model():
    width, half = 1 - KEPT[0], (1 - KEPT[0] ** 2) / 2
    even = additive(torch.ones(1000), torch.arange(1000))  # f(k) = k
    assert (cpr(even), cmd(even)) == (pytest.approx(half), pytest.approx(width - half))
    one = torch.zeros(1000)
    one[7] = 3.0
    best, worst = (additive(one, one.argsort(stable=True, descending=down)) for down in (False, True))
    assert (cpr(best), cmd(best)) == (pytest.approx(width), pytest.approx(0.0))
    assert (cpr(worst), cmd(worst)) == (pytest.approx(0.25), pytest.approx(width - 0.25))  # from 50 % to all
    helpful = torch.tensor([2.0] * 500 + [-1.0] * 500)  # f(0.5) = 2: more than the model
    over = additive(helpful, helpful.argsort(stable=True))
    f = np.array([4 * share for share in KEPT[:-1]] + [1.0])
    assert cpr(over) == pytest.approx(trapezoids(f)) and cmd(over) == pytest.approx(trapezoids(abs(1 - f)))


def trapezoids(f: np.ndarray) -> float:
    return sum((a + b) / 2 * (to - at) for (a, b), (at, to) in zip(pairwise(f), pairwise(KEPT), strict=True))


def test_faithfulness_is_that_of_the_means():
    """The mean over prompts comes before the ratio, as in the published protocol."""
    leads = np.stack([additive(torch.ones(1000), torch.arange(1000)), np.zeros(12)])
    assert of_means(leads, cpr)["mean"] == pytest.approx(float(cpr(leads[0])))
    assert of_means(np.zeros((2, 12)), cpr)["mean"] is None  # nothing does what the model does


def test_methods_are_compared_by_a_quantity_of_means():
    draw = np.random.default_rng(0)
    a, b = draw.normal(1, 1, (40, 1)), draw.normal(3, 1, (40, 1))
    plain = {name: one[:, 0].tolist() for name, one in (("a", a), ("b", b))}
    for higher in (True, False):
        found = compared_of_means({"a": a, "b": b}, lambda x: x[..., 0], higher, seed=1)
        assert found == compared(plain, higher, seed=1)
        assert found["a" if higher else "b"]["from_best"]["significant"]
    leads = np.tile(additive(torch.ones(1000), torch.arange(1000)), (40, 1))
    areas = compared_of_means({"a": leads, "b": 0 * leads}, cpr, True)  # of b nothing is known
    assert areas["a"]["mean"] == areas["a"]["low"] == pytest.approx(0.5, rel=1e-4) and areas["a"]["from_best"] is None
    assert areas["b"]["mean"] is None and areas["b"]["low"] is None


# -- the study --------------------------------------------------------------------------------------------------------


def test_a_result_holds_all_methods_and_can_be_recomputed(engine, cheap, tmp_path):
    out = tmp_path / "c.json"
    found = run(ComponentStudy(engine, Settings(prompts=10)), out, model="demo")
    assert json.loads(out.read_text()) == found
    assert found["kinds"] == [HEADS, NEURONS] and found["summary"]["left_out"] == {ATTN_LRP: "AttnLRP: not here."}
    for kind in found["kinds"]:
        digits = [row[kind]["masked"]["shapley, log-prob"][SIGNED][LOWEST][0] for row in found["rows"]]
        of_end = found["summary"][kind]["masked"][SIGNED][LOWEST]
        shares = [sum(int(one[i]) for one in digits) / 10 for i in range(len(SHARES[kind][LOWEST]))]
        assert of_end["by_share"]["shapley, log-prob"] == pytest.approx(shares, abs=1e-4)
        assert of_end["accuracy"]["shapley, log-prob"]["mean"] == pytest.approx(sum(shares) / len(shares), abs=1e-4)
        circuits = found["summary"][kind]["circuits"][SIGNED]
        row = [[r["lead"], r[kind]["nothing"], *r[kind]["kept"]["shapley, contrast"][SIGNED]] for r in found["rows"]]
        assert circuits["CPR"]["shapley, contrast"]["mean"] == pytest.approx(float(cpr(np.mean(row, 0))), rel=1e-4)
    tables = ComponentStudy.tables(found)
    assert [table.title for table in tables] == [
        "The lowest masked, accuracy",
        "The highest masked, accuracy",
        "The lowest masked, probability",
        "The highest masked, probability",
        "Circuits",
    ]
    assert all(len(row) == 5 for table in tables for row in table.rows) and "*" in tables[4].markdown()
    names = [row[0] for row in tables[0].rows]
    assert {"shapley, log-prob", "shapley, logit", RANDOM, PUBLISHED_NORM} <= set(names)
    assert not any("published" in row[0] for row in tables[4].rows)
    panels = ComponentStudy.panels(found)
    assert len(panels) == 4 and "shapley, log-prob, by size" in panels[0].lines and "random, by size" in panels[0].lines


def test_equal_masks_run_once(engine, question, cheap):
    """Nothing kept, and all kept, are the same mask in every ranking."""
    ComponentStudy(engine, Settings(quick=True)).measure(Item("0", question))
    for kind in (HEADS, NEURONS):
        shape = (engine.adapter.n_layers, widths(engine, kind)[0])
        masks = torch.cat([one for one in cheap if one.shape[1:] == shape]).flatten(1)
        assert len(masks.unique(dim=0)) == len(masks) and masks.all(1).sum() == 1 == (~masks.any(1)).sum()


def test_a_run_that_was_cut_short_goes_on(engine, cheap, tmp_path, monkeypatch):
    out, measure, measured = tmp_path / "c.json", ComponentStudy.measure, []

    def fails(self, item):
        measured.append(item.key)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return measure(self, item)

    monkeypatch.setattr(ComponentStudy, "measure", fails)
    settings = Settings(prompts=2, quick=True)
    with pytest.raises(KeyboardInterrupt):
        run(ComponentStudy(engine, settings), out, model="demo")
    found = run(ComponentStudy(engine, settings), out, model="demo")
    assert measured == ["0", "1", "1"] and len(found["rows"]) == 2
    again = run(ComponentStudy(engine, settings), None, model="demo")
    assert again["summary"] == found["summary"]


def test_a_mixture_of_experts_has_heads_alone(cheap):
    engine = DePass(build_model("mixtral", num_key_value_heads=2), progress=False)
    ids = torch.tensor(random_ids(5))
    given = Question(0, "p", "a", ids, 3, 4, torch.zeros(5, dtype=torch.bool))
    study = ComponentStudy(engine, Settings(quick=True))
    row = study.measure(Item("0", given))
    assert study.kinds == (HEADS,) and HEADS in row and NEURONS not in row
    result = {**study.facts(), "summary": study.summary([row]), "rows": [row]}
    tables = study.tables(result)
    assert len(tables[0].header) == 3 and "mixture of experts" in tables[0].note
    assert len(study.panels(result)) == 2


def test_every_method_on_a_real_question(engine, question, monkeypatch):
    """No stand-in: what a method calls high matters more than what is drawn at random."""
    monkeypatch.setattr(components, "COMPARED", (SHAPLEY, RANDOM))
    row = ComponentStudy(engine, Settings(quick=True)).measure(Item("0", question))
    masked = row[HEADS]["masked"]
    assert masked["shapley, log-prob"][SIGNED][HIGHEST][1] < masked[RANDOM][BY_SIZE][HIGHEST][1]
    assert {"AttnLRP, log-prob", PUBLISHED_NORM} <= masked.keys() and "left_out" not in row
    last = row[HEADS]["kept"][f"shapley, {CONTRAST}"][SIGNED][-1]
    assert last == pytest.approx(row["lead"], rel=1e-2) and SOFTMAX in COMPARED
