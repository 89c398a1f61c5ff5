"""Continuations and several positions on the command line."""

from __future__ import annotations

import json

import pytest

from depass_fast import Attribution, DePass, Heads, Tokens
from depass_fast.demo import load_demo
from tests.support.command import ATTRIBUTE, fail, one_thread, run  # noqa: F401 (a fixture)

PROMPT, NEXT = "When Diane met Grace at the park, Grace handed the camera", " to Diane"
TOKENS = [*ATTRIBUTE, "--prompt", PROMPT, "--components", "tokens"]


@pytest.fixture(scope="module")
def engine():
    return DePass(*load_demo())


def objects(capsys, *arguments: str) -> list[dict]:
    """The JSON objects that a command prints."""
    return [json.loads(line) for line in run(capsys, *arguments, "--json").splitlines()]


def near(scores) -> object:
    return pytest.approx(scores.tolist(), abs=1e-4)


def test_a_continuation(capsys, tmp_path, engine):
    expected = engine.attribute(PROMPT, Tokens(), continuation=NEXT)
    (found,) = objects(capsys, *TOKENS, "--continuation", NEXT, "--out", str(tmp_path / "shares.safetensors"))
    assert found["log_probs"] == near(expected.log_probs)
    for name, steps in (("steps", expected.steps), ("log_prob_steps", expected.log_prob_steps)):
        assert [one["scores"] for one in found[name]] == [near(step.scores) for step in steps]
    assert Attribution.load(tmp_path / "shares.safetensors").log_probs.tolist() == found["log_probs"]
    ids = engine.tokenizer.encode(NEXT, add_special_tokens=False)
    assert objects(capsys, *TOKENS, "--continuation-ids", " ".join(map(str, ids)))[0]["log_probs"] == found["log_probs"]
    assert run(capsys, *TOKENS, "--continuation", NEXT).strip() == str(expected).strip()
    heads = [*ATTRIBUTE, "--prompt", PROMPT, "--components", "heads", "--layer", "5", "--continuation", NEXT]
    assert "5 others" in run(capsys, *heads, "--reduce", "sum", "--top", "3")


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_a_reduced_continuation(capsys, engine, reduce):
    expected = engine.attribute(PROMPT, Heads(layers="all"), continuation=NEXT, reduce=reduce)
    arguments = [*ATTRIBUTE, "--prompt", PROMPT, "--components", "heads", "--layer", "all"]
    (found,) = objects(capsys, *arguments, "--continuation", NEXT, "--reduce", reduce)
    for one, layer in zip(found["layers"], expected, strict=True):
        assert one["scores"] == near(layer.scores)


def test_several_positions_give_a_result_each(capsys, tmp_path, engine):
    expected = engine.attribute(PROMPT, Tokens(), position=[3, 8, -1])
    found = objects(capsys, *TOKENS, "--position", "3,8,-1", "--out", str(tmp_path / "shares.csv"))
    assert [one["scores"] for one in found] == [near(one.scores) for one in expected]
    assert [one["position"] for one in found] == [one.position for one in expected]
    assert len(list(tmp_path.iterdir())) == 3
    assert objects(capsys, *TOKENS, "--position", "3")[0]["scores"] == near(expected[0].scores)
    assert [one["position"] for one in objects(capsys, *TOKENS, "--position", "-1,3")] == [expected[-1].position, 3]
    assert run(capsys, *TOKENS, "--position", "3,8").count("\n\n'") == 1


def test_lines_with_a_continuation_each(capsys, tmp_path, engine):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        json.dumps({"prompt": PROMPT, "continuation": NEXT}) + '\n{"input_ids": [1, 5], "continuation": [9, 7]}'
    )
    found = objects(capsys, *ATTRIBUTE, "--components", "tokens", "--prompts", str(path), "--reduce", "sum")
    expected = [
        engine.attribute(PROMPT, Tokens(), continuation=NEXT, reduce="sum"),
        engine.attribute([1, 5], Tokens(), continuation=[9, 7], reduce="sum"),
    ]
    assert [one["scores"] for one in found] == [near(one.scores) for one in expected]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--position", "x"], ["--position", "'x'", "3,8,-1"]),
        (["--position", "3,,4"], ["--position", "'3,,4'"]),
        (["--reduce", "sum"], ["--reduce:", "--continuation"]),
        (["--continuation", ""], ["--continuation", "empty"]),
        (["--continuation", "a", "--target", "b"], ["--target:", "continuation"]),
        (["--continuation", "a", "--position", "3"], ["--position:", "continuation"]),
        (["--continuation", "a", "--top", "3"], ["--top:", "--reduce"]),
        (["--continuation", "a", "--continuation-ids", "3"], ["--continuation-ids", "--continuation"]),
    ],
)
def test_errors_come_before_any_model(capsys, monkeypatch, arguments, parts):
    monkeypatch.setattr("depass_fast.cli.attribute.engine_of", lambda *_: pytest.fail("a model was loaded"))
    message = fail(capsys, *TOKENS, *arguments)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("lines", "part"),
    [
        (['{"prompt": "a", "continuation": "b"}', '"c"'], "either every line"),
        (['{"prompt": "a", "continuation": "b", "target": 3}'], "are the targets"),
        (['{"prompt": "a", "continuation": 3}'], "line 1: continuation: expected a list"),
    ],
)
def test_lines_that_do_not_go_together(capsys, tmp_path, lines, part):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines))
    assert part in fail(capsys, *ATTRIBUTE, "--components", "tokens", "--prompts", str(path))


def test_ids_that_there_are_not(capsys):
    message = fail(capsys, *TOKENS, "--continuation-ids", "3 99999")
    assert "--continuation-ids:" in message and "99999" in message
