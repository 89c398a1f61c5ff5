"""Ledgers, reports and graphs of models whose layers have no MLP, or no attention: what there is, is shown."""

from __future__ import annotations

import csv
import json

import pytest

from depass_fast import DePass
from depass_fast.adapters.recurrent import knows_recurrences
from tests.support.command import fail, one_thread, run  # noqa: F401 (a fixture)
from tests.support.family_models import build_variant
from tests.support.pages import needs_pages

pytestmark = pytest.mark.skipif(not knows_recurrences(), reason="the installed transformers is too old")
IDS = [5, 11, 3, 8, 60, 2]
THERE = ("tokens", "modules", "heads")
PROMPT = ("--input-ids", " ".join(map(str, IDS)), "--device", "cpu", "--quiet")


@pytest.fixture(scope="module")
def mamba() -> DePass:
    return DePass(build_variant("mamba2", 0), progress=False)


@pytest.fixture(scope="module")
def folder(mamba, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("mamba2")
    mamba.model.save_pretrained(path)
    return str(path)


def test_a_ledger_holds_what_there_is(mamba, tmp_path):
    ledger = mamba.ledger(IDS, 5)
    assert ledger.kinds == THERE and [kind for kind in ledger.to_dict() if kind in (*THERE, "neurons")] == [*THERE]
    assert "heads at" in str(ledger) and "neurons" not in str(ledger)
    assert {entry.kind for entry in ledger.top(40)} == {"tokens", "heads"}
    assert ledger.top(3) == ledger.top(3, kinds=["heads", "tokens"])
    ledger.save(tmp_path / "book.safetensors")
    assert (
        str(mamba.load_ledger(tmp_path / "book.safetensors")).split("ledger |")[0] == str(ledger).split("ledger |")[0]
    )
    for ask in (lambda: ledger.top(kinds=["neurons"]), lambda: ledger.plot(kind="neurons"), ledger.neurons):
        with pytest.raises(ValueError, match="no layer of this model has (neurons; it has 'tokens', |what Neurons)"):
            ask()


@needs_pages
def test_a_report_with_a_graph(mamba, tmp_path):
    report = mamba.report(IDS, 5, graph=30)
    assert "heads at" in str(report) and "neurons" not in str(report)
    report.to_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size > 10_000


@needs_pages
def test_commands(capsys, folder, tmp_path):
    book = ("ledger", "--model", folder, *PROMPT)
    page = tmp_path / "page.html"
    found = json.loads(run(capsys, *book, "--json", "--html", str(page), "--plot", str(tmp_path / "page.png")))
    assert [kind for kind in (*THERE, "neurons") if kind in found] == [*THERE] and page.exists()
    assert "heads at" in run(capsys, *book, "--out", str(tmp_path / "book.csv"))
    with (tmp_path / "book.csv").open() as file:
        assert {row["kind"] for row in csv.DictReader(file)} == set(THERE)
    assert "no layer of this model has neurons" in fail(capsys, *book, "--kinds", "heads,neurons")
    out = run(capsys, "report", "--model", folder, *PROMPT, "--graph", "30", "--out", str(page))
    assert "heads at" in out and "neurons at" not in out


def test_layers_with_one_of_the_two():
    dp = DePass(build_variant("nemotron_h", 0), progress=False)
    report, ledger = dp.report(IDS, 5), dp.ledger(IDS, 5)
    assert ledger.kinds == (*THERE, "neurons") and "neurons at" in str(report)
    assert {entry.kind for entry in ledger.top(400)} == {"tokens", "heads", "neurons"}
