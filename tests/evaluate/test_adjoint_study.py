"""The study of the adjoint sweep: its scores against exact ones, its estimate and warnings against the truth."""

from __future__ import annotations

import pytest

from depass_fast import DePass, Neurons
from depass_fast.demo import load_demo
from depass_fast.evaluate.plot import draw
from depass_fast.evaluate.run import run
from depass_fast.evaluate.statistics import mean
from depass_fast.evaluate.studies import adjoint
from depass_fast.evaluate.study import Settings
from depass_fast.options import Adjoint


@pytest.fixture(scope="module")
def engine() -> DePass:
    return DePass(*load_demo(), progress=False)


@pytest.fixture(scope="module")
def result(engine) -> dict:
    return run(adjoint.AdjointStudy(engine, Settings(prompts=1, quick=True, layers=(2, 4))), model="demo")


def test_errors_are_those_of_the_sweep(engine, result):
    row, study = result["rows"][0], adjoint.AdjointStudy(engine, Settings())
    question = next(item for item in study.items() if item is not None).value
    exact = engine.attribute(question.ids, Neurons(4), question.target, method="exact")
    found, _ = adjoint.sweep(engine, engine.trace(question.ids), Adjoint(refine=0), question.target)
    n = len(exact.labels) - exact.n_extras
    one = row["unrefined"]["layers"][1]
    error = float((found[4].scores[:n] - exact.scores[:n]).norm() / exact.scores[:n].norm())
    assert one["layer"] == 4 and one["error"] == pytest.approx(error, rel=0.05)
    assert found.estimate is not None and found.estimate.layer_errors is not None
    assert one["estimate"] == pytest.approx(found.estimate.layer_errors[4], rel=0.05)
    assert row["unrefined"]["warnings"] == (found.warnings or [])
    assert one["spearman"] > 0.99 and one["pearson"] > 0.99
    assert row["shapley"]["layer"] == 4 and row["shapley"]["error"] < 1e-5


def test_start_layers_are_spread_over_the_depth(engine):
    assert adjoint.AdjointStudy(engine, Settings()).layers == [0, 2, 3, 4]
    assert adjoint.AdjointStudy(engine, Settings(quick=True)).layers == [0, 2]
    with pytest.raises(ValueError, match=r"layers: \[-1\] are asked for"):
        adjoint.AdjointStudy(engine, Settings(layers=(-1,)))


def layer(number: int, error: float, estimate: float, named: bool) -> dict:
    return {"layer": number, "error": error, "estimate": estimate, "named": named} | dict.fromkeys(
        ("spearman", "pearson", "top1_overlap"), 1 - error
    )


def test_the_truth_of_the_estimate_is_counted():
    cases = [(0.0, 0.0, False), (0.01, 0.02, True), (0.02, 0.01, False), (0.03, 0.03, True), (0.2, 0.1, False)]
    found = list(adjoint.truth([layer(0, *case) for case in cases]))
    assert [(one["above"], one["to"], one["count"], one["named"]) for one in found] == [
        (0.0, 0.02, 3, 1),
        (0.02, 0.05, 1, 1),
        (0.05, None, 1, 0),
    ]
    assert found[0]["ratio"] == pytest.approx([0.8, 1.25, 1.7]) and found[2]["ratio"] == pytest.approx([0.5] * 3)


def test_a_warning_names_whole_numbers():
    said = ["the scores of layer 1 by 4%, layer 21 by 9% are off"]
    assert [adjoint.is_named(n, said) for n in (1, 2, 21)] == [True, False, True]
    assert not adjoint.is_named(0, None)


def rows(count: int) -> list[dict]:
    """Rows of prompts whose sweep is wrong at layer 0, unnamed, and warned of for another reason in every other."""
    found = []
    for i in range(count):
        swept = {"seconds": 1.0 + i, "layers": [layer(0, 0.06 + i / 1000, 0.02, False), layer(2, 0.001, 0.001, False)]}
        swept["warnings"] = ["refinement moved the largest scores"] * (i % 2)
        linear = {"layer": 2, "error": 1e-7 * (i + 1), "seconds": 0.1, "exact_seconds": 2.0}
        found.append({"exact_seconds": 30.0, "default": swept, "unrefined": swept, "shapley": linear})
    return found


def test_the_summary_is_that_of_the_rows(engine, tmp_path):
    study = adjoint.AdjointStudy(engine, Settings(layers=(0, 2)))
    result = {"prompts": 12, "summary": study.summary(rows(12)), **study.facts()}
    one = result["summary"]["default"]
    assert one["layers"][0]["error"] == mean([0.06 + i / 1000 for i in range(12)])
    assert one["layers"][0]["worst_error"] == pytest.approx(0.071) and one["layers"][0]["named"] == 0
    assert [(band["count"], band["named"]) for band in one["truth"]] == [(12, 0), (0, 0), (12, 0)]
    assert [(band["count"], band["named"]) for band in one["prompts"]] == [
        (0, 0),
        (0, 0),
        (12, 0),
    ]  # the warning is of something else
    assert result["summary"]["shapley"]["largest_error"] == pytest.approx(1.2e-6)
    tables = {table.title: table for table in study.tables(result)}
    assert all(len(row) == len(table.header) for table in tables.values() for row in table.rows)
    assert tables["Truth of the estimate"].rows[2] == ["default", "above 5%", "12", "0", "12", "0.29", "0.31", "0.32"]
    assert tables["Truth of the warnings"].rows[2] == ["default", "above 5%", "12", "0", "12"]
    assert "the largest relative error of a prompt is 1e-06" in tables["Cost"].note
    panels = study.panels(result)
    assert list(panels[0].lines) == [
        "default",
        "default, as estimated",
        "unrefined",
        "unrefined, as estimated",
    ]
    assert panels[0].log_y and list(panels[1].lines) == ["default", "unrefined"]
    pytest.importorskip("matplotlib")
    draw(panels, tmp_path / "sweep.svg")
    assert "as estimated" in (tmp_path / "sweep.svg").read_text()


def test_the_result_of_a_run_has_its_tables(result):
    tables = adjoint.AdjointStudy.tables(result)
    assert [row[1] for row in tables[0].rows] == ["2", "4", "2", "4"]
    assert len(adjoint.AdjointStudy.panels(result)) == 2
