"""The study of grouping: scores of neurons in groups against all at once, with time and peak memory."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from depass_fast import DePass, Neurons
from depass_fast.demo import load_demo
from depass_fast.evaluate import peak
from depass_fast.evaluate.plot import draw
from depass_fast.evaluate.run import run
from depass_fast.evaluate.statistics import mean
from depass_fast.evaluate.studies import grouping
from depass_fast.evaluate.study import Settings
from tests.support.family_models import build_model
from tests.support.models import random_ids


@pytest.fixture(scope="module")
def engine() -> DePass:
    return DePass(*load_demo(), progress=False)


@pytest.fixture(scope="module")
def result(engine) -> dict:
    return run(grouping.GroupingStudy(engine, Settings(prompts=1, quick=True, layers=(4,))), model="demo")


def test_every_way_has_its_figures(result):
    found = [(one["rule"], one["grouping"], one["groups"]) for one in result["rows"][0]["runs"]]
    assert found == [
        ("softmax", "all at once", 1),
        ("softmax", "contiguous", 4),
        ("softmax", "random", 4),
        ("shapley", "all at once", 1),
        ("shapley", "contiguous", 4),
    ]
    whole, contiguous, drawn, _, linear = result["rows"][0]["runs"]
    assert whole["neurons"] == 512 and "relative_error" not in whole
    assert contiguous["relative_error"] > 0.01 and drawn["relative_error"] > 0.01
    assert contiguous["relative_error"] != drawn["relative_error"]
    assert linear["relative_error"] < 1e-5 and linear["sum_ratio"] == pytest.approx(1.0, abs=1e-4)
    assert all(one["seconds"] > 0 for one in result["rows"][0]["runs"])
    assert json.loads(json.dumps(result["summary"])) == result["summary"]


def test_the_summary_is_that_of_the_rows(engine, result):
    study = grouping.GroupingStudy(engine, Settings(prompts=12, layers=(4,)))
    rows = [
        {
            "runs": [
                {**one, **({"spearman": 0.9 + i / 1000, "sum_ratio": i} if one["groups"] > 1 else {})} for one in runs
            ]
        }
        for i, runs in enumerate([result["rows"][0]["runs"]] * 12)
    ]
    found = study.summary(rows)["runs"]
    assert found[1]["spearman"] == mean([0.9 + i / 1000 for i in range(12)])
    assert found[1]["sum_ratio"]["median"] == 5.5 and "sum_ratio" not in found[0]


def test_the_tables_and_the_picture(result, tmp_path):
    [table] = grouping.GroupingStudy.tables(result)
    assert [row[:4] for row in table.rows][1:3] == [
        ["softmax", "4", "4", "contiguous"],
        ["softmax", "4", "4", "random"],
    ]
    assert table.rows[0][4:9] == ["0", "1", "1", "1", "1"] and {len(row) for row in table.rows} == {len(table.header)}
    panels = grouping.GroupingStudy.panels(result)
    assert panels[0].lines["layer 4"][0] == [1, 4] or panels[0].lines["layer 4"][0] == [4]
    pytest.importorskip("matplotlib")
    draw(panels, tmp_path / "groups.svg")
    assert "layer 4" in (tmp_path / "groups.svg").read_text()


def test_one_group_is_exact_for_neurons_of_experts_too():
    engine, ids = (
        DePass(build_model("mixtral", num_key_value_heads=2, num_local_experts=4)),
        torch.tensor(random_ids(5)),
    )
    exact = engine.attribute(ids, Neurons(0), 5, method="exact")
    true = exact.scores[: len(exact.labels) - exact.n_extras]
    found = grouping.grouped_scores(engine, ids, 0, grouping.split(len(true), 1, "contiguous"), 5, rows=0)
    assert grouping.compare(found, true)["relative_error"] < 1e-5


def test_a_layer_that_is_not_there_is_refused(engine):
    with pytest.raises(ValueError, match=r"layers: \[6\] are asked for; the model has 0 to 5"):
        grouping.GroupingStudy(engine, Settings(layers=(6,)))
    assert grouping.GroupingStudy(engine, Settings()).layers == [3, 4]
    assert grouping.GroupingStudy(engine, Settings(layers=(4, 1, 4))).layers == [1, 4]


@pytest.mark.skipif(not peak.measurable(), reason="the system does not tell a process its peak")
def test_the_peak_is_that_of_the_call():
    """In a process of its own: what other tests freed, or what a library's first call reads in, would count, too."""
    code = """
import torch
from depass_fast.evaluate import peak
held, size = [], 32 * 2**20
calls = lambda: torch.ones(size // 4).sum(), lambda: held.append(torch.ones(size // 4)), lambda: held[0].sum()
for call in calls:  # what their first run reads in
    call()
held.clear()
peak.give_back()
print([round(peak.measured(call) / 2**20) for call in calls])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[32, 32, 0]", done.stderr


def test_where_the_system_does_not_tell_a_peak_there_is_none(engine, monkeypatch):
    monkeypatch.setattr(grouping, "measurable", lambda device: False)
    study = grouping.GroupingStudy(engine, Settings(quick=True))
    found, cost = study._timed(lambda: torch.ones(2))
    assert found.tolist() == [1.0, 1.0] and cost["peak_mib"] is None
    run = {"layer": 0, "rule": "softmax", "grouping": "all at once", "groups": 1, **cost}
    result = {"prompts": 1, "summary": study.summary([{"runs": [run]}])}
    assert study.tables(result)[0].rows[0][-1] == "-" and study.panels(result) == []
