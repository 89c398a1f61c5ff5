"""The study of projection: classifiers by seed, subspaces, shares in them, agreement, and a run on the demo model."""

from __future__ import annotations

import json
import math

import pytest
import torch

from depass_fast import DePass, LogProb, Subspaces, Tokens
from depass_fast.demo import load_demo
from depass_fast.evaluate.questions import Question, Text, answered
from depass_fast.evaluate.run import run
from depass_fast.evaluate.statements import truthfulness
from depass_fast.evaluate.studies import projection_scores as scores
from depass_fast.evaluate.studies.projection import ProjectionStudy
from depass_fast.evaluate.studies.projection_scores import RANDOM, RULES, SIGNED, TRAINED, kind_of, orthonormal
from depass_fast.evaluate.study import Settings
from tests.evaluate.test_truth import separable

LAYERS = (2, 4)


@pytest.fixture(scope="module")
def engine() -> DePass:
    return DePass(*load_demo(), progress=False)


@pytest.fixture(scope="module")
def question(engine) -> Question:
    text = Text("When Mary and John went to the store, John gave a drink to", "Mary")
    found = next(answered(engine, [text]))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def bases(engine) -> dict[int, scores.Bases]:
    """Return two subspaces of every kind at two layers, all random."""
    draws, width = torch.Generator().manual_seed(0), engine.adapter.hidden_size
    return {
        layer: {
            kind_of(origin, rank): [orthonormal(torch.randn(width, rank, generator=draws)) for _ in range(2)]
            for rank in scores.RANKS
            for origin in (TRAINED, RANDOM)
        }
        for layer in LAYERS
    }


def test_a_sample_leaves_whole_groups_over():
    given, _ = separable()
    drawn, left = scores.sample(given, "0-0")
    assert len(drawn) == 80 and set(drawn) | set(left) == set(range(80)) and not set(drawn) & set(left)
    assert 15 < len(left) < 45 and scores.sample(given, "0-0") == (drawn, left) != scores.sample(given, "0-1")


def test_classifiers_learn_from_what_the_ones_before_leave_over():
    given, x = separable(200)
    found = scores.classifiers(given, x, range(200), 3)
    directions = [truthfulness(one) for one in found]
    assert given.accuracy(found[0], x, range(200)) == 1
    unit = directions[0] / directions[0].norm()
    second = truthfulness(given.fit(x - torch.outer(x @ unit, unit), range(200)))
    assert torch.allclose(directions[1], second, atol=1e-4) and not torch.allclose(directions[0], second, atol=1e-2)
    basis = orthonormal(torch.stack(directions, 1))
    assert torch.allclose(basis.T @ basis, torch.eye(3, dtype=basis.dtype), atol=1e-9)
    assert float(basis[:, 0] @ directions[0].double()) == pytest.approx(float(directions[0].norm()))


def test_nearness_of_subspaces():
    axes = torch.eye(4, dtype=torch.double)
    assert scores.nearness(axes[:, :2], axes[:, [1, 0]]) == pytest.approx(1)
    assert scores.nearness(axes[:, :2], axes[:, 1:3]) == pytest.approx(math.sqrt(0.5))
    assert scores.nearness(axes[:, :1], axes[:, 1:2]) == 0


def test_shares_are_those_of_the_subspaces(engine, question, bases):
    found = scores.subspace_shares(engine, engine.trace(question.ids), question, bases)
    kind = kind_of(RANDOM, 4)
    for layer in LAYERS:
        for rule in RULES:
            given = Subspaces(layer, [bases[layer][kind][1]])
            own = engine.attribute(
                question.ids, given, LogProb(question.target), allocation=rule, method="exact"
            ).scores
            assert found[layer][rule][kind][1] == pytest.approx(float(own[0] / own.sum()), rel=2e-3, abs=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_token_scores_are_those_of_the_projected_state(engine, question, bases, rule):
    trace, layer, n = engine.trace(question.ids), LAYERS[0], len(question.ids)
    found = scores.token_scores(engine, trace, bases[layer], layer, rule, question.special)
    state = engine.decompose(question.ids, Tokens(), end=layer, allocation=rule).dense()[-1, :n].double()  # (M, D)
    x, free = trace.resid(layer)[-1].double(), ~question.special
    for kind in (kind_of(TRAINED, 1), kind_of(RANDOM, 4)):
        basis = bases[layer][kind][0]
        projected = basis @ basis.T @ x
        expected = (state @ projected / projected.norm())[free]
        assert torch.allclose(found[kind][0].double(), expected, atol=1e-4)
    direction = bases[layer][kind_of(TRAINED, 1)][0][:, 0]
    assert torch.allclose(found[SIGNED][0].double(), (state @ direction)[free], atol=1e-4)


def test_agreement_of_equal_and_of_opposite_scores():
    a = torch.tensor([4.0, -3.0, 2.0, 1.0, 0.5])
    given = {kind_of(origin, rank): [a, a] for origin in (TRAINED, RANDOM) for rank in scores.RANKS}
    given[SIGNED] = [a, -a]
    found = scores.agreement(given)
    assert set(found) == {name for name, _ in scores.pairs_of(given)} and len(found) == 7
    assert found[kind_of(TRAINED, 4)] == {"spearman": 1.0, "pearson": 1.0, "top 3": 1.0, "top 10 %": 1.0}
    assert found[SIGNED] == {"spearman": -1.0, "pearson": -1.0, "top 3": 1.0, "top 10 %": 1.0}
    pairs = dict(scores.pairs_of({name: range(5) for name in given}))
    assert [len(pairs[name]) for name in (kind_of(TRAINED, 1), kind_of(scores.ACROSS, 1))] == [10, 25]


def test_a_run_has_tables_and_panels(engine, tmp_path):
    study = ProjectionStudy(engine, Settings(prompts=2, quick=True, layers=LAYERS))
    result = run(study, tmp_path / "projection.json", model="demo", progress=False)
    assert json.loads((tmp_path / "projection.json").read_text()) == result
    assert set(result["accuracy_by_layer"]) == set(result["cosines"]) == {"2", "4"}
    assert min(min(values) for values in result["accuracy_by_layer"].values()) > 0.9
    of_layer = result["summary"]["layers"]["2"]
    first = [row["layers"]["2"]["agreement"]["shapley"][SIGNED]["pearson"] for row in result["rows"]]
    assert of_layer["agreement"]["shapley"][SIGNED]["pearson"]["mean"] == pytest.approx(sum(first) / 2, abs=1e-4)
    shares = [row["layers"]["2"]["shares"]["softmax"][kind_of(RANDOM, 1)] for row in result["rows"]]
    assert of_layer["shares"]["softmax"][kind_of(RANDOM, 1)]["mean"]["mean"] == pytest.approx(
        sum(map(sum, shares)) / 4, abs=1e-4
    )
    text = "\n".join(table.plain() for table in ProjectionStudy.tables(result))
    assert "trained and random, rank 4" in text and "nan" not in text
    assert [panel.lines[SIGNED][0] for panel in ProjectionStudy.panels(result)] == [[2, 4], [2, 4]]
