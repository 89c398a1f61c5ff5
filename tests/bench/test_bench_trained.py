"""The studies of the adjoint sweep: a run that is started again keeps what it has, nothing is lost after the work."""

from __future__ import annotations

import json
import re
import sys

import pytest

from bench.core.cli import command, picture, writable
from bench.report.trained import section
from bench.studies import adjoint, trained
from depass_fast import DePass
from tests.support.family_models import build_model


def fake(engine: DePass, prompt: str, layers: list[int]) -> dict:
    rows = [{"layer": layer, "error": 0.01 * (layer + 1), "estimate": 0.02} for layer in layers]
    return {"prompt": prompt, "tokens": 3, "seconds": 1.5, "exact_seconds": 61.0, "layers": rows, "warnings": None}


@pytest.fixture
def compared(monkeypatch) -> list[str]:
    """The prompts that were compared, by a study of a model of three layers."""
    found: list[str] = []
    monkeypatch.setattr(trained.DePass, "from_pretrained", lambda *args, **kwargs: DePass(build_model("llama")))
    monkeypatch.setattr(trained, "compare", lambda *args: found.append(args[1]) or fake(*args))
    return found


def test_prompts_that_are_done_are_kept(compared, tmp_path, capsys) -> None:
    out = tmp_path / "made" / "out.json"
    common = ["--model", "some/model", "--out", str(out)]
    trained.main([*common, "--prompts", "3", "1"])
    trained.main([*common, "--prompts", "1", "2"])
    assert compared == [trained.PROMPTS[i] for i in (3, 1, 2)]
    found = json.loads(out.read_text())
    assert [one["prompt"] for one in found["prompts"]] == compared and found["model"] == "model"
    assert [row["layer"] for row in found["prompts"][0]["layers"]] == [0, 1]
    said = capsys.readouterr().out
    assert f"is in {out}" in said and "exact   61.0 s" in said
    assert not list(out.parent.glob("*.part"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--name", "another"], "holds figures of model, this is another"),
        (["--layers", "0"], r"start layers \[0, 1\], asked are \[0\]"),
        (["--layers", "3"], "the model has 0 to 2"),
        (["--prompts", "20"], "there are 0 to 19"),
    ],
)
def test_another_model_and_other_layers_are_refused(compared, tmp_path, capsys, more, message) -> None:
    common = ["--model", "some/model", "--out", str(tmp_path / "out.json")]
    trained.main([*common, "--prompts", "0"])
    with pytest.raises(SystemExit):
        trained.main([*common, "--prompts", "1", *more])
    assert len(compared) == 1
    assert re.search(message, capsys.readouterr().err)


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch, capsys) -> None:
    parser = command("bench.some", "A command.")
    parser.add_argument("--out", type=writable)
    parser.add_argument("--plot", type=picture)
    old = tmp_path / "old.json"
    old.write_text("kept")
    assert parser.parse_args(["--out", str(old)]).out == old and old.read_text() == "kept"
    assert not parser.parse_args(["--out", str(tmp_path / "a" / "new.json")]).out.exists()
    with pytest.raises(SystemExit):
        parser.parse_args(["--out", str(tmp_path)])
    assert "cannot be written (Is a directory)" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parser.parse_args(["--out", str(old / "new.json")])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit):
        parser.parse_args(["--plot", str(tmp_path / "new.svg")])
    assert "a picture needs matplotlib: pip install" in capsys.readouterr().err


def test_results_are_written_before_the_picture(monkeypatch, tmp_path) -> None:
    def fails(*args: object) -> None:
        raise RuntimeError("no font")

    out = tmp_path / "out.json"
    monkeypatch.setitem(sys.modules, "matplotlib", sys)  # one that can be imported
    monkeypatch.setattr(adjoint, "run", lambda size: {"faithfulness": {"accuracy": {}}})
    monkeypatch.setattr(adjoint, "draw", fails)
    with pytest.raises(RuntimeError, match="no font"):
        adjoint.main(["--quick", "--out", str(out), "--plot", str(tmp_path / "out.svg")])
    assert json.loads(out.read_text())["faithfulness"] == {"accuracy": {}}


def test_the_section_tells_how_true_the_estimate_is() -> None:
    first, second = (fake(None, prompt, [0, 1]) for prompt in ("a", "b"))
    second["layers"][1] |= {"error": 0.08, "estimate": 0.04}
    second["warnings"] = ["the scores of layer 1 by 4% are off"]
    second["commit"] = "older"
    place = {"device": "a CPU", "threads": 1, "date": "2026-01-01", "commit": "new"}
    text = section({"benchmark": "trained", "environment": place, "model": "A", "prompts": [first, second]})
    assert "4 start layers of 2 prompts" in text and "measured at older" in text
    assert "name 1 of the 1 layers above 5%, and 0 of the 3 up to 2%" in text
    assert "| `'b'` | the scores of layer 1 by 4% are off | 3 | 2 | 4.50% | 8.00% (4.00%) | 1 | 1.5 s | 61 s |" in text
    assert "| above 5.0% | 1 | 1 | 0.5 | 0.5 | 0.5 |" in text
