"""``--target-kind``: the logit of a target on the command line, or its log-probability."""

from __future__ import annotations

import json

import pytest

from depass_fast import Attribution, DePass, Heads, LogProb, Tokens
from depass_fast.demo import load_demo
from tests.support.command import ATTRIBUTE, fail, one_thread, run  # noqa: F401 (a fixture)

FIRST, SECOND = "Nyria Morstam speaks", "When Diane met Grace at the park, Grace handed the camera to"
TOKENS = [*ATTRIBUTE, "--components", "tokens"]
LOG_PROB = ["--target-kind", "log-prob"]


@pytest.fixture(scope="module")
def engine():
    return DePass(*load_demo())


def objects(capsys, *arguments: str) -> list[dict]:
    """The JSON objects that a command prints."""
    return [json.loads(line) for line in run(capsys, *ATTRIBUTE, *arguments, *LOG_PROB, "--json").splitlines()]


@pytest.mark.parametrize("given", [["--target", " Diane"], ["--target-id"], []])
def test_a_log_probability(capsys, engine, given, tmp_path):
    ids = engine.tokenizer.encode(" Diane", add_special_tokens=False)
    given = [*given, str(ids[0])] if given == ["--target-id"] else given  # the model's own is the same
    out = tmp_path / "heads.safetensors"
    (found,) = objects(capsys, "--prompt", SECOND, "--components", "heads", "--layer", "2", *given, "--out", str(out))
    expected = engine.attribute(SECOND, Heads(2), LogProb(" Diane"))
    assert found["scores"] == pytest.approx(expected.scores.tolist(), abs=1e-4)
    assert (found["target_id"], found["target_kind"]) == (ids[0], "log-prob")
    assert found["target"] == "log P(' Diane'), P frozen" and found["contrast_id"] is None
    assert Attribution.load(out).target_kinds == ["log-prob"]
    text = run(capsys, *ATTRIBUTE, "--prompt", SECOND, "--components", "heads", "--layer", "2", *given, *LOG_PROB)
    assert text.startswith("log P(' Diane'), P frozen at position 13 (after ' to'): log P + entropy")


def test_several_prompts_and_positions(capsys, engine):
    found = objects(capsys, "--components", "tokens", "--prompt", FIRST, "--prompt", SECOND, "--position", "1,-1")
    expected = engine.attribute([FIRST, SECOND], Tokens(), LogProb(), position=[1, -1])
    assert [one["scores"] for one in found] == [
        pytest.approx(one.scores.tolist(), abs=1e-4) for each in expected for one in each
    ]


def test_the_lines_of_a_file(capsys, engine, tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [FIRST, {"prompt": SECOND, "target": " Grace"}, {"prompt": FIRST, "target": 7}]
    path.write_text("\n".join(map(json.dumps, lines)))
    found = objects(capsys, "--components", "tokens", "--prompts", str(path), "--batch-size", "2")
    targets = [LogProb(), LogProb(" Grace"), LogProb(7)]
    expected = engine.attribute([FIRST, SECOND, FIRST], Tokens(), targets=targets)
    assert [one["target"] for one in found] == [one.target_names[0] for one in expected]
    assert [one["scores"] for one in found] == [pytest.approx(one.scores.tolist(), abs=1e-4) for one in expected]
    path.write_text(json.dumps({"prompt": FIRST, "target": " Italian Italian"}))
    message = fail(capsys, *TOKENS, "--prompts", str(path), *LOG_PROB)
    assert "--prompts: prompt 1: target: ' Italian Italian' is 2 tokens" in message
    path.write_text("\n".join(map(json.dumps, [FIRST, {"prompt": FIRST, "target": [" Italian", " French"]}])))
    assert "--target-kind: log-prob is of one token" in fail(capsys, *TOKENS, "--prompts", str(path), *LOG_PROB)
    path.write_text(json.dumps({"prompt": FIRST, "continuation": " Italian"}))
    assert "--target-kind: a continuation has" in fail(capsys, *TOKENS, "--prompts", str(path), *LOG_PROB)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--contrast", " Grace"], "--target-kind: the difference of two log-probabilities is that of the logits"),
        (["--continuation", " Grace"], "--target-kind: a continuation has the shares in logits and log-probabilities"),
        (["--target-id", "100000"], "--target-id: id 100000 is outside the vocabulary"),
        (["--target", " Italian Italian"], "--target: ' Italian Italian' is 2 tokens"),
        (["--target-kind", "probability"], "--target-kind: invalid choice"),
    ],
)
def test_errors(capsys, arguments, expected):
    assert expected in fail(capsys, *TOKENS, "--prompt", FIRST, *LOG_PROB, *arguments)
