"""The file of a report, without a browser: what is embedded is harmless, sizes are bounded, pictures never fail."""

import html
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from depass_fast import Adjoint, Attribution, DePass, Heads, Neurons, Tokens, write_html
from depass_fast.cli.main import main
from depass_fast.report import page
from depass_fast.report.page import embedded
from tests.support.family_models import build_variant
from tests.support.pages import HOSTILE, PROMPT, TARGET, data_of, demo, needs_pages, with_tokens

pytestmark = needs_pages


def test_data_ends_no_element():
    found = embedded({"tokens": [*HOSTILE, "\ud800"]})
    assert not set("<>&\u2028\u2029\ud800") & set(found)
    assert json.loads(found)["tokens"] == [*HOSTILE, "\ud800"]


def test_hostile_tokens_are_in_no_markup(tmp_path):
    with_tokens(HOSTILE).to_html(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text("utf-8")
    assert "<script>alert" not in text and text.count("<script") == text.count("</script>") == 3
    assert data_of(tmp_path / "page.html")["sheets"][0]["tokens"] == HOSTILE
    assert "default-src 'none'" in html.unescape(text) and "unsafe-eval" not in text
    assert "<script>" not in with_tokens(HOSTILE)._repr_html_()


def test_every_result_has_a_page(tmp_path):
    several = demo().attribute(PROMPT, Heads(layers="all"), [TARGET, " hat"], position=[-1, 5])
    whole = demo().attribute("Nyria Morstam", Tokens(), continuation=" speaks Italian")
    book = demo().ledger(PROMPT, TARGET)
    write_html([several, whole, book.neurons(3), demo().report(PROMPT), book], tmp_path / "page.html")
    names = [sheet["name"] for sheet in data_of(tmp_path / "page.html")["sheets"]]
    assert len(names) == 4 + 3 + 1 + 1 + 1 and len(set(names[:7])) == 7
    with pytest.raises(TypeError, match="number 1 is of type Trace, .*dp.report"):
        write_html([whole, demo().trace(PROMPT)], tmp_path / "no.html")
    with pytest.raises(ValueError, match="no result"):
        write_html([], tmp_path / "no.html")
    with pytest.raises(ValueError, match="a report is of one prompt"):
        demo().report([PROMPT, PROMPT])
    assert not (tmp_path / "no.html").exists()


def test_a_page_names_no_folder(tmp_path):
    book = demo().ledger("Nyria Morstam")
    why = demo().explain_attention("Nyria Morstam", Tokens(), layer=0, head=0)
    graph = demo().graph("Nyria Morstam", nodes=5)
    write_html([book, why, graph, demo().report("Nyria Morstam")], tmp_path / "page.html")
    folder = str(Path(demo().model.config._name_or_path).parent)
    assert len(folder) > 5 and folder not in (tmp_path / "page.html").read_text("utf-8")
    assert folder not in str(graph.to_json()) and graph.to_json()["metadata"]["scan"] == "model"


def test_a_folder_that_is_not_there_is_named(tmp_path):
    graph, report = demo().graph("Nyria Morstam", nodes=5), demo().report("Nyria Morstam")
    for one in (report, graph, with_tokens(["a"])):
        with pytest.raises(FileNotFoundError, match="there is no folder '.*no'; make it"):
            one.to_html(tmp_path / "no" / "page.html")
        with pytest.raises(IsADirectoryError, match="it is a folder"):
            one.to_html(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        write_html([graph], tmp_path / "no" / "page.html")


def test_an_approximate_result_says_so(tmp_path):
    result = demo().attribute(PROMPT, Neurons(layers="all"), method=Adjoint(refine=4, sample=8))
    result.warnings = [*(result.warnings or []), "made up"]
    result.to_html(tmp_path / "page.html")
    (sheet,) = data_of(tmp_path / "page.html")["sheets"]
    assert (
        not sheet["exact"] and "made up" in sheet["warnings"] and any("Approximate" in one for one in sheet["warnings"])
    )
    assert not any("docs/" in one for one in sheet["warnings"])  # a lone file has no such folder
    assert "Approximate" in result._repr_html_() and "made up" in result._repr_html_()


def test_a_picture_in_a_notebook_is_small_and_never_fails(monkeypatch):
    result = demo().attribute(PROMPT, Tokens(), TARGET)
    shown = result._repr_html_()
    assert len(shown) < 6000 and "Diane" in shown and "<script" not in shown and re.search(r"\+18\.5", shown)
    long = demo().attribute(list(range(5, 500)), Heads(layers="all"))._repr_html_()
    assert len(long) < 60_000 and "367 more" in long
    heads = demo().attribute(PROMPT, Heads(layers="all"), TARGET)
    pieces = [
        (float(start), float(length), colour)
        for start, length, colour in re.findall(
            r"margin-left:([\d.]+)%;width:([\d.]+)%;height:10px;background:rgb\((\d+)", heads._repr_html_()
        )
    ]
    zero = pieces[0][0]
    assert len(pieces) == 12 and zero + pieces[0][1] == pytest.approx(100, abs=0.2), "the largest share ends the axis"
    for start, length, colour in pieces:
        assert (start if colour == "217" else start + length) == pytest.approx(zero, abs=0.2)
    assert {colour for *_, colour in pieces} == {"217", "36"}
    assert demo().report(PROMPT, TARGET)._repr_html_().count("<tr>") > 5
    assert replace(result, scores=result.scores * torch.nan)._repr_html_() is None
    assert Attribution._repr_html_(None) is None
    monkeypatch.setitem(sys.modules, "jinja2", None)
    page.environment.cache_clear()
    assert result._repr_html_() is None
    with pytest.raises(ImportError, match=r"depass-fast\[report\]"):
        result.to_html("never.html")


def test_without_the_extra_the_error_names_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(page, "find_spec", lambda name: None)
    page._library.cache_clear()
    with pytest.raises(ImportError, match=r"pip install vl-convert-python.*depass-fast\[report\]"):
        with_tokens(["a"]).to_html(tmp_path / "page.html")
    given = ["report", "--model", "demo", "--prompt", "x", "--out", str(tmp_path / "page.html")]
    assert main(given) == 2 and "depass-fast[report]" in capsys.readouterr().err  # before the model is loaded
    assert not (tmp_path / "page.html").exists()


def test_commands_write_pages(tmp_path, capsys):
    given = ["--model", "demo", "--prompt", "Nyria Morstam speaks", "--target", " Italian", "--quiet"]
    assert main(["report", *given, "--out", str(tmp_path / "report.html")]) == 0
    printed = capsys.readouterr()
    assert "tokens at layer 0" in printed.out and "report.html" in printed.err
    assert len(data_of(tmp_path / "report.html")["sheets"]) == 1
    more = ["--prompt", "The cat", "--components", "tokens", "--position", "0,1"]
    assert main(["attribute", *given, *more, "--html", str(tmp_path / "shares.html")]) == 0
    assert len(data_of(tmp_path / "shares.html")["sheets"]) == 4
    assert main(["report", *given, "--out", str(tmp_path / "report.txt")]) == 2


def test_the_repr_of_a_report():
    report = demo().report(PROMPT, [TARGET, " Grace"])
    assert repr(report).startswith("Report(2 sheets: ' Diane' at position 13")
    assert str(report).splitlines()[0].startswith("' Diane' at position 13")
    assert isinstance(demo(), DePass)


def test_what_is_printed_and_the_page_agree():
    """One completeness error, the ledger's; and why modules are other numbers than the map's cells."""
    report, book = demo().report(PROMPT, TARGET), demo().ledger(PROMPT, TARGET)
    assert report.sheets[0].error == book.page_sheets()[0].error == book.completeness_error
    assert f"completeness error {book.completeness_error:.1e} |" in str(report)
    assert f"completeness error {book.completeness_error:.1e}: how far a sum is off" in report.sheets[0].about
    lead = next(view["lead"] for view in report.sheets[0].views if view["kind"] == "map")
    assert "in front of the layer's MLP" in lead and "{" not in lead
    assert str(report).endswith("in front of the layer's MLP, so that they hold what it makes of them")
    parallel = DePass(build_variant("gpt_neox: parallel")).report([3, 1, 4], 7)
    assert "in front of" not in f"{parallel} {parallel.sheets[0].views}"
