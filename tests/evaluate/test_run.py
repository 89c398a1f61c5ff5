"""A run of a study: resumed, refused, written whole; and the command that makes it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from depass_fast import DePass
from depass_fast.cli.main import main
from depass_fast.demo import load_demo
from depass_fast.evaluate import catalog, plot, statistics
from depass_fast.evaluate.interventions import next_logits
from depass_fast.evaluate.run import run
from depass_fast.evaluate.study import QuestionStudy, Settings
from depass_fast.evaluate.tables import Panel, Table, figure


class Probabilities(QuestionStudy):
    """The answer's probability."""

    name, title = "probabilities", "Probabilities"
    measured: list[str] = []  # noqa: RUF012

    def measure(self, item):
        self.measured.append(item.key)
        question = item.value
        return {"p": float(next_logits(self.engine, question.ids[None])[0].softmax(-1)[question.target])}

    def summary(self, rows):
        return {"p": statistics.mean([row["p"] for row in rows], self.settings.seed)}

    @staticmethod
    def tables(result):
        return [Table("Probability", ["model", "p"], [[result["model"]["name"], figure(result["summary"]["p"])]])]

    @staticmethod
    def panels(result):
        x, y = zip(*enumerate(row["p"] for row in result["rows"]), strict=True)
        return [Panel("p", "prompt", "probability", {"p": (x, y)}, {"p": (x, y, y)}, log_x=True)]


@pytest.fixture(scope="module")
def engine() -> DePass:
    return DePass(*load_demo(), progress=False)


@pytest.fixture(autouse=True)
def none_measured(monkeypatch):
    monkeypatch.setattr(Probabilities, "measured", [])


def test_a_result_says_what_it_is_of(engine, tmp_path):
    out, lines = tmp_path / "p.json", []
    found = run(Probabilities(engine, Settings(prompts=12, seed=3)), out, model="demo", report=lines.append)
    assert json.loads(out.read_text()) == found and not out.with_name("p.json.part").exists()
    assert (found["prompts"], found["asked"], found["accuracy"], found["seed"]) == (12, 12, 1.0, 3)
    weights = found["model"].pop("weights")
    assert found["model"] == {"name": "demo", "type": "llama", "layers": 6, "hidden_size": 128, "dtype": "float32"}
    assert len(weights) == 16 and found["versions"].keys() == {"depass_fast", "torch", "transformers"}
    assert {"numpy", "device", "threads", "date"} <= found["environment"].keys()
    assert len(found["rows"]) == len(lines) == 12 and found["seconds_per_prompt"] > 0
    assert found["summary"]["p"] == statistics.mean([row["p"] for row in found["rows"]], 3)


def test_a_run_that_was_cut_short_goes_on(engine, tmp_path, monkeypatch):
    out, study = tmp_path / "p.json", Probabilities(engine, Settings(prompts=3, quick=True))
    whole, measure = run(study, None, model="demo"), Probabilities.measure

    def fails(self, item):
        if item.key == "2":
            raise KeyboardInterrupt
        return measure(self, item)

    monkeypatch.setattr(Probabilities, "measure", fails)
    with pytest.raises(KeyboardInterrupt):
        run(study, out, model="demo")
    part = out.with_name("p.json.part")
    part.write_text(part.read_text() + '{"key": "2", "p"')  # a line that was cut short
    assert not out.exists() and part.read_text().count("\n") == 3
    monkeypatch.setattr(Probabilities, "measure", measure)
    Probabilities.measured.clear()
    found = run(study, out, model="demo")
    assert Probabilities.measured == ["2"]
    assert [row["p"] for row in found["rows"]] == [row["p"] for row in whole["rows"]]


def test_a_result_is_gone_on_with_for_more_prompts(engine, tmp_path):
    out, given = tmp_path / "p.json", Settings(prompts=2, quick=True)
    few = run(Probabilities(engine, given), out, model="demo")
    Probabilities.measured.clear()
    more = run(Probabilities(engine, replace(given, prompts=3)), out, model="demo")
    assert Probabilities.measured == ["2"] and more["rows"][:2] == few["rows"] and more["prompts"] == 3
    with pytest.raises(ValueError, match="p.json: it holds 3 prompts, 2 are asked for"):
        run(Probabilities(engine, given), out, model="demo")
    with pytest.raises(ValueError, match="p.json: it holds another run, whose seed is 0; here it is 1"):
        run(Probabilities(engine, replace(given, seed=1)), out, model="demo")
    assert not out.with_name("p.json.part").exists()
    for text in ("no JSON", "[]", "{}", '{"rows": [1]}'):
        out.write_text(text)
        with pytest.raises(ValueError, match="p.json: it holds no result of a study"):
            run(Probabilities(engine, given), out, model="demo")


@pytest.mark.parametrize(("settings", "model", "what"), [({"seed": 1}, "demo", "seed"), ({}, "other", "model")])
def test_another_run_is_not_gone_on_with(engine, tmp_path, settings, model, what):
    out, given = tmp_path / "p.json", Settings(prompts=2, quick=True)
    study = Probabilities(engine, given)
    part = out.with_name("p.json.part")
    run(study, out, model="demo")
    part.write_text(json.dumps(json.loads(out.read_text()) | {"rows": None}) + "\n")
    with pytest.raises(ValueError, match=f"p.json.part: it holds another run, whose {what} is"):
        run(Probabilities(engine, replace(given, **settings)), out, model=model)
    for text in ("no JSON\n", "5\n[]\n"):
        part.write_text(text)
        with pytest.raises(ValueError, match="no run that was cut short"):
            run(study, out, model="demo")
    part.write_text("[1]\n")
    with pytest.raises(ValueError, match="it holds another run"):
        run(study, out, model="demo")


def test_a_run_of_other_weights_is_not_gone_on_with(tmp_path):
    model, tokenizer = load_demo()
    engine, out = DePass(model, tokenizer, progress=False), tmp_path / "p.json"
    run(Probabilities(engine, Settings(prompts=2, quick=True)), out, model="demo")
    model.model.layers[0].mlp.down_proj.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match=r"p.json: it holds another run, whose model is .*weights"):
        run(Probabilities(engine, Settings(prompts=3, quick=True)), out, model="demo")


def test_an_empty_part_is_none(engine, tmp_path):
    out = tmp_path / "p.json"
    out.with_name("p.json.part").touch()
    assert run(Probabilities(engine, Settings(prompts=2, quick=True)), out, model="demo")["prompts"] == 2


def test_too_few_prompts_and_no_answers_are_refused(engine, tmp_path):
    with pytest.raises(ValueError, match="prompts: 9 are too few for a 95 % interval, which takes 10"):
        run(Probabilities(engine, Settings(prompts=9)), model="demo")
    path = tmp_path / "wrong.json"
    path.write_text('[{"prompt": "Nyria Morstam speaks", "answer": "camera"}]')
    with pytest.raises(ValueError, match=r"answers none of the 1 prompts of .*wrong.json \(accuracy 0 %\)"):
        run(Probabilities(engine, Settings(data=path)), model="demo")
    path.write_text('[{"prompt": "Nyria Morstam speaks", "answer": "Italian"}]')
    with pytest.raises(ValueError, match=r"answers 1 of the 1 prompts .*accuracy 100%.*too few"):
        run(Probabilities(engine, Settings(data=path)), model="demo")


# -- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def as_tokens(monkeypatch):
    """The command `evaluate tokens` runs the study of this file."""
    monkeypatch.setattr(catalog.Entry, "load", lambda self: Probabilities)


def test_the_command_prints_and_writes(as_tokens, capsys, tmp_path):
    out = tmp_path / "p.json"
    given = ["evaluate", "tokens", "--model", "demo", "--quick", "--out", str(out)]
    assert main(given) == 0
    printed = capsys.readouterr()
    assert "Probability." in printed.out and "demo" in printed.out
    assert f"wrote {out}" in printed.err and "2 of 2" in printed.err
    out.unlink()
    assert main([*given, "--json", "--name", "mine", "--quiet"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["model"]["name"] == "mine" and "2 of 2" not in printed.err


def test_the_command_draws(as_tokens, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    svg = tmp_path / "p.svg"
    assert main(["evaluate", "tokens", "--model", "demo", "--quick", "--plot", str(svg)]) == 0
    first = svg.read_bytes()
    assert b"probability" in first and f"wrote {svg}" in capsys.readouterr().err


def test_a_study_without_curves_has_no_picture(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="plot: this study has no curves"):
        plot.draw([], tmp_path / "p.svg")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"depass-fast\[plot\]"):
        plot.draw([Panel("a", "b", "c")], tmp_path / "p.svg")


REFUSED = {
    "evaluate": "the following arguments are required: {tokens,components,",
    "evaluate dance --model demo": "invalid choice",
    "evaluate tokens --model demo --data nowhere.json": "there is no file 'nowhere.json'",
    "evaluate tokens --model demo --seed -1": "--seed",
    "evaluate tokens --model demo --seed 10001": "'10001' is not an integer from 0 to 10,000",
    "evaluate tokens --model demo --prompts 5": "--prompts: 5 are too few for a 95 % interval",
    "evaluate tokens --model demo --out here.csv": "must end in .json",
    "evaluate tokens --model nobody/nothing": "--data: it is needed, a file with prompts with their answers",
    "evaluate truth --model nobody/nothing --data setup.py": "--train: it is needed, a file with statements",
}


@pytest.mark.parametrize(("given", "message"), REFUSED.items())
def test_the_command_refuses(given, message, capsys):
    assert main(given.split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
