"""``depass-fast ledger`` on the demo model."""

from __future__ import annotations

import csv
import json

import pytest

from depass_fast import Contrast, DePass, LogProb
from depass_fast.cli import flags, ledger
from depass_fast.demo import load_demo
from depass_fast.ledger.given import OWN_KINDS
from depass_fast.linear_rules import LINEAR_RULES
from tests.support.command import fail, one_thread, run  # noqa: F401 (a fixture)

FIRST, SECOND = "Nyria Morstam speaks", "When Diane met Grace at the park, Grace handed the camera to"
LEDGER = ["ledger", "--model", "demo", "--device", "cpu"]
CLOSE = 1e-4


@pytest.fixture(scope="module")
def engine():
    return DePass(*load_demo())


def objects(capsys, *arguments: str) -> list[dict]:
    """The JSON objects that the command prints."""
    return [json.loads(line) for line in run(capsys, *LEDGER, *arguments, "--json").splitlines()]


def scores(found: dict) -> dict[str, list[float]]:
    """The scores of every kind, of all layers in a row."""
    layers = {kind: found[kind].get("layers", [found[kind]]) for kind in OWN_KINDS if kind in found}
    return {kind: [score for one in each for score in one["scores"]] for kind, each in layers.items()}


def same(found: dict, expected: dict) -> bool:
    mine, theirs = scores(found), scores(expected)
    return mine.keys() == theirs.keys() and all(mine[k] == pytest.approx(theirs[k], abs=CLOSE) for k in mine)


def test_flags_name_what_the_library_has():
    assert sorted(flags.LINEAR_RULES) == sorted(LINEAR_RULES) and list(OWN_KINDS) == [*ledger.KINDS]


def test_text(capsys, engine):
    out = run(capsys, *LEDGER, "--prompt", FIRST)
    expected = str(engine.ledger(FIRST))
    assert [line for line in out.splitlines() if "ledger |" not in line] == [
        line for line in expected.splitlines() if "ledger |" not in line
    ]
    places = [out.index(f"\n{kind} at ") for kind in OWN_KINDS]
    assert places == sorted(places)
    out = run(capsys, *LEDGER, "--prompt", FIRST, "--top", "2", "--kinds", "heads,tokens", "--rule", "half")
    assert "neurons at" not in out and out.count("L0H") == 2 and "ledger | half | cpu" in out
    assert "ledger | taylor | cpu" in run(
        capsys, *LEDGER, "--prompt", FIRST, "--allocation", "taylor", "--kinds", "heads"
    )


def test_colour_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = run(capsys, *LEDGER, "--prompt", FIRST, "--kinds", "tokens")
    assert "\x1b[" in out and "Nyria" in out


@pytest.mark.parametrize(
    ("arguments", "target"),
    [
        ([], None),
        (["--target", " Diane", "--target-kind", "log-prob"], LogProb(" Diane")),
        (["--target", " Diane", "--contrast", " Grace"], Contrast(" Diane", " Grace")),
    ],
)
def test_json(capsys, engine, arguments, target):
    (found,) = objects(capsys, "--prompt", SECOND, *arguments)
    assert same(found, engine.ledger(SECOND, target).to_dict())
    assert found["rule"] == "shapley" and found["completeness_error"] < 1e-5
    assert sum(found["tokens"]["scores"]) == pytest.approx(found["target_logit"], abs=1e-3)


def test_several_prompts_and_positions(capsys, engine, tmp_path):
    arguments = ["--prompt", FIRST, "--prompt", SECOND, "--position", "1,-1", "--kinds", "heads", "--rule", "taylor"]
    book = engine.ledger([FIRST, SECOND], position=[1, -1], rule="taylor")
    pages = [(prompt, read) for prompt in range(2) for read in range(2)]
    out = tmp_path / "heads.jsonl"
    found = objects(capsys, *arguments, "--batch-size", "1", "--out", str(out))
    for one, (prompt, read) in zip(found, pages, strict=True):
        assert same(one, book.to_dict(kinds=["heads"], prompt=prompt, read=read)), (prompt, read)
    assert [json.loads(line)["heads"] for line in out.read_text().splitlines()] == [one["heads"] for one in found]
    text = run(capsys, *LEDGER, *arguments)
    assert text.count("prompt 1 of 2") == text.count("prompt 2 of 2") == 1 and text.count("heads at") == 4
    assert "view(" not in text


def test_the_lines_of_a_file(capsys, engine, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, [FIRST, {"prompt": SECOND, "target": " Grace"}])))
    found = objects(capsys, "--prompts", str(path), "--kinds", "tokens")
    book = engine.ledger([FIRST, SECOND], targets=[None, " Grace"])
    assert all(same(one, book.to_dict(kinds=["tokens"], prompt=i)) for i, one in enumerate(found))
    path.write_text(json.dumps({"prompt": FIRST, "continuation": " Italian"}))
    assert "--prompts: a ledger has targets" in fail(capsys, *LEDGER, "--prompts", str(path))


def test_a_table(capsys, engine, tmp_path):
    out = tmp_path / "shares.csv"
    run(capsys, *LEDGER, "--prompt", FIRST, "--kinds", "heads,tokens", "--out", str(out))
    with open(out, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["kind", "layer", "label", "score"]
    for kind, values in scores(engine.ledger(FIRST).to_dict(kinds=["tokens", "heads"])).items():
        assert [float(row[3]) for row in rows if row[0] == kind] == pytest.approx(values, abs=CLOSE)
    assert rows[0][:3] == ["tokens", "0", "'<s>'@0"] and rows[-1][:3] == ["heads", "5", "rest"]


def test_a_ledger_that_answers_more(capsys, engine, tmp_path):
    out = tmp_path / "book.safetensors"
    run(capsys, *LEDGER, "--prompt", FIRST, "--out", str(out))
    loaded, expected = engine.load_ledger(out), engine.ledger(FIRST)
    assert loaded.tokens(3).scores.tolist() == pytest.approx(expected.tokens(3).scores.tolist(), abs=CLOSE)
    run(capsys, *LEDGER, "--prompt", FIRST, "--prompt", SECOND, "--batch-size", "1", "--out", str(out))
    for number, prompt in enumerate((FIRST, SECOND)):
        one = engine.load_ledger(tmp_path / f"book-{number}.safetensors").tokens()[0]
        assert one.scores.tolist() == pytest.approx(engine.ledger(prompt).tokens().scores.tolist(), abs=CLOSE)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--rule", "softmax"], "--layer all --method adjoint"),
        (["--kinds", "heads,features"], "--kinds: 'features' is not one of tokens, modules, heads, neurons"),
        (["--target-id", "100000"], "--target-id: id 100000 is outside the vocabulary"),
        (["--contrast", " Grace", "--target-kind", "log-prob"], "--target-kind: the difference of two"),
        (["--position", "99"], "--position: 99 is out of range"),
        (["--out", "book.txt"], "--out: 'book.txt' must end in"),
        (["--target", " Diane Grace"], "given to `depass-fast attribute --continuation`"),
        (["--allocation", "relu"], "--rule/--allocation: 'relu' is not one of the linear rules"),
        (["--top", "0"], "--top: '0' is not a positive integer"),
    ],
)
def test_errors(capsys, arguments, expected):
    assert expected in fail(capsys, *LEDGER, "--prompt", FIRST, *arguments)
