"""Generation on the command line."""

from __future__ import annotations

import csv
import json
import warnings

import pytest

from depass_fast import DePass, Generation
from depass_fast.cli.main import main
from depass_fast.demo import load_demo
from tests.support.command import fail, one_thread, run  # noqa: F401 (a fixture)

PROMPT = "When Diane met Grace at the park, Grace handed"
GENERATE = ["generate", "--model", "demo", "--device", "cpu", "--prompt", PROMPT, "--max-new-tokens", "3"]


@pytest.fixture(scope="module")
def expected():
    return DePass(*load_demo()).attribute_generation(PROMPT, max_new_tokens=3)


def test_text_and_what_it_drew_on(capsys, expected):
    assert run(capsys, *GENERATE).splitlines()[:-1] == str(expected).splitlines()[:-1]


def test_json(capsys, tmp_path, expected):
    out = tmp_path / "generation.jsonl"
    found = json.loads(run(capsys, *GENERATE, "--json", "--out", str(out)))
    assert (found["text"], found["prompt_length"]) == (expected.text, expected.prompt_length)
    assert found["input_ids"] == expected.input_ids and found["completeness_error"] < 1e-5
    for step, one in zip(found["steps"], expected.steps, strict=True):
        assert step["scores"] == pytest.approx(one.scores.tolist(), abs=1e-4) and step["target_id"] == one.target_ids[0]
    assert json.loads(out.read_text()) == found
    out = tmp_path / "generation.safetensors"
    run(capsys, *GENERATE, "--out", str(out))
    assert Generation.load(out).input_ids == expected.input_ids


def test_a_table(capsys, tmp_path, expected):
    out = tmp_path / "generation.csv"
    run(capsys, *GENERATE, "--out", str(out))
    with open(out, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["position", "token", "label", "score", "log_prob_score"]
    assert len(rows) == sum(len(step.labels) for step in expected.steps)
    assert [row[1] for row in rows[:1]] == [expected.tokens[expected.prompt_length]]


def test_a_warning_is_a_line_on_standard_error(capsys, monkeypatch):
    generated = DePass.attribute_generation

    def doubtful(*args, **kwargs):
        warnings.warn("the text begins with\na BOS", UserWarning, stacklevel=1)
        return generated(*args, **kwargs)

    monkeypatch.setattr(DePass, "attribute_generation", doubtful)
    assert main(GENERATE) == 0
    assert "depass-fast: warning: the text begins with a BOS\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--prompt", "again"], ["--prompt", "twice"]),
        (["--max-new-tokens", "0"], ["--max-new-tokens", "'0'"]),
        (["--max-new-tokens", "600"], ["--max-new-tokens:", "600", "512"]),
        (["--out", "generation.txt"], ["--out", ".csv"]),
        (["--chat-template-kwargs", "{}"], ["--chat-template-kwargs:", "--chat "]),
        (["--temperature", "-1"], ["--temperature", "-1"]),
    ],
)
def test_errors_name_the_flag(capsys, arguments, parts):
    message = fail(capsys, *GENERATE, *arguments)
    assert all(part in message for part in parts), message
