"""Chats, several prompts and standard input on the command line."""

from __future__ import annotations

import csv
import io
import json

import pytest

from depass_fast import Attribution, DePass, Tokens
from depass_fast.cli.main import main
from depass_fast.demo import load_demo
from tests.support.command import ATTRIBUTE, fail, one_thread, run  # noqa: F401 (a fixture)

FIRST, SECOND = "Nyria Morstam speaks", "When Diane met Grace at the park, Grace handed the camera to"
CHAT = [{"role": "user", "content": FIRST}]
TOKENS = [*ATTRIBUTE, "--components", "tokens"]


@pytest.fixture(scope="module")
def engine():
    return DePass(*load_demo())


def objects(capsys, *arguments: str) -> list[dict]:
    """The JSON objects that a command prints."""
    return [json.loads(line) for line in run(capsys, *TOKENS, *arguments, "--json").splitlines()]


def scores(result) -> list[float]:
    return pytest.approx(result.scores.tolist(), abs=1e-4)


def test_a_dash_reads_standard_input(capsys, monkeypatch, engine):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{FIRST}\n"))
    (found,) = objects(capsys, "--prompt", "-")
    assert found["scores"] == scores(engine.attribute(FIRST, Tokens()))
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert "--prompt: empty" in fail(capsys, *TOKENS, "--prompt", "-")


def test_a_chat_in_place_in_a_file_and_from_standard_input(capsys, monkeypatch, tmp_path, engine):
    expected = engine.attribute(CHAT, Tokens())
    path = tmp_path / "chat.json"
    path.write_text(json.dumps(CHAT))
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(CHAT)))
    for given in (json.dumps(CHAT), str(path), "-"):
        (found,) = objects(capsys, "--chat", given)
        assert found["input_ids"] == expected.input_ids and found["scores"] == scores(expected)


def test_what_a_template_reads(capsys, monkeypatch, tmp_path):
    model, tokenizer = load_demo()
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if thinks %} Nyria{% endif %}{{ tools | length }}"
    monkeypatch.setattr("depass_fast.demo.load_demo", lambda *_: (model, tokenizer))
    expected = DePass(model, tokenizer, chat_template_kwargs={"thinks": True, "tools": [{}]}).attribute(CHAT, Tokens())
    thinks, chat = ["--chat-template-kwargs", '{"thinks": true}'], json.dumps({"messages": CHAT, "tools": [{}]})
    (found,) = objects(capsys, "--chat", chat, *thinks)
    assert found["input_ids"] == expected.input_ids and found["scores"] == scores(expected)
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"messages": CHAT}))
    both = ["--chat-template-kwargs", '{"thinks": true, "tools": [{}]}']
    assert objects(capsys, "--prompts", str(path), *both)[0]["input_ids"] == expected.input_ids
    assert main([*TOKENS, "--chat", chat, "--chat-template-kwargs", '{"tokenize": false}']) == 2
    assert "--chat-template-kwargs: 'tokenize'" in capsys.readouterr().err


def test_several_prompts_give_a_line_of_json_each(capsys, engine):
    found = objects(capsys, "--prompt", FIRST, "--prompt", SECOND, "--target", " Diane", "--batch-size", "1")
    expected = engine.attribute([FIRST, SECOND], Tokens(), " Diane")
    assert [one["scores"] for one in found] == [scores(one) for one in expected]
    text = run(capsys, *TOKENS, "--prompt", FIRST, "--prompt", SECOND)
    assert text.startswith("prompt 1 of 2\n") and "\n\nprompt 2 of 2\n" in text


def test_a_file_of_texts(capsys, tmp_path, engine):
    path = tmp_path / "prompts.txt"
    path.write_text(f"{FIRST}\r\n\n{SECOND}\n", newline="")
    found = objects(capsys, "--prompts", str(path))
    assert [one["scores"] for one in found] == [scores(one) for one in engine.attribute([FIRST, SECOND], Tokens())]


def test_a_file_of_json_with_targets(capsys, tmp_path, engine):
    path, out = tmp_path / "prompts.jsonl", tmp_path / "shares.jsonl"
    ids = engine.tokenizer.encode(FIRST)
    lines = [
        FIRST,
        {"prompt": SECOND, "target": [" Diane", " Grace"]},
        {"input_ids": ids, "target": 7},
        {"messages": CHAT, "target": None},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    found = objects(capsys, "--prompts", str(path), "--batch-size", "3", "--out", str(out))
    expected = [
        engine.attribute(FIRST, Tokens()),
        engine.attribute(SECOND, Tokens(), (" Diane", " Grace")),
        engine.attribute(ids, Tokens(), 7),
        engine.attribute(CHAT, Tokens()),
    ]
    assert [one["scores"] for one in found] == [scores(one) for one in expected]
    assert [one["target"] for one in found] == [one.target_names[0] for one in expected]
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert written == found and sorted(file.name for file in tmp_path.iterdir()) == ["prompts.jsonl", "shares.jsonl"]


def test_a_file_of_one_prompt_is_written_like_several(capsys, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text(FIRST)
    assert len(objects(capsys, "--prompts", str(path), "--out", str(tmp_path / "one.csv"))) == 1
    assert (tmp_path / "one-0.csv").is_file()


@pytest.mark.parametrize("suffix", ["csv", "safetensors"])
def test_a_file_for_each_of_several_prompts(capsys, tmp_path, suffix):
    out = tmp_path / f"shares.{suffix}"
    found = objects(capsys, "--prompt", FIRST, "--prompt", SECOND, "--out", str(out))
    assert not out.exists()
    for number, one in enumerate(found):
        path = tmp_path / f"shares-{number}.{suffix}"
        if suffix == "csv":
            with open(path, newline="", encoding="utf-8") as file:
                assert [label for label, _ in list(csv.reader(file))[1:]] == one["labels"]
        else:
            assert Attribution.load(path).labels == one["labels"]


def test_a_file_that_cannot_be_written_is_an_error_before_any_work(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("os.access", lambda *_: False)
    message = fail(capsys, *TOKENS, "--prompt", FIRST, "--out", str(tmp_path / "shares.csv"))
    assert "--out" in message and "no permission" in message


def test_a_full_disk_loses_no_result(capsys, monkeypatch, tmp_path):
    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(Attribution, "to_csv", full)
    assert main([*TOKENS, "--prompt", FIRST, "--json", "--out", str(tmp_path / "shares.csv")]) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["labels"] and "No space left" in captured.err


def test_lines_of_json_of_one_prompt(capsys, tmp_path):
    out = tmp_path / "one.jsonl"
    (found,) = objects(capsys, "--prompt", FIRST, "--out", str(out))
    assert json.loads(out.read_text()) == found


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("", ["no prompts"]),
        ("\n\n", ["no prompts"]),
        ('"a"\nb', ["line 2", "not JSON"]),
        ("7", ["line 1", "input_ids", "7"]),
        ('{"text": "a"}', ["line 1", "'text'", "messages"]),
        ('{"prompt": "a", "input_ids": [1]}', ["line 1", "one of"]),
        ('{"prompt": ""}', ["line 1", "not empty"]),
        ('{"input_ids": [1, true]}', ["line 1", "token ids"]),
        ('{"messages": [{"content": "a"}]}', ["line 1", '"role"']),
        ('{"prompt": "a\\ud800"}', ["line 1", "UTF-8"]),
        ('"\\ud800"', ["line 1", "UTF-8"]),
        ('{"prompt": "a", "target": [1, 2, 3]}', ["line 1: target: expected a token id", "[1, 2, 3]"]),
        ('{"prompt": "a", "target": true}', ["line 1: target: expected a token id", "True"]),
        ('{"prompt": "a", "target": ""}', ["line 1: target: expected a text that is not empty"]),
    ],
)
def test_errors_name_the_line(capsys, tmp_path, content, parts):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    message = fail(capsys, *TOKENS, "--prompts", str(path))
    assert all(part in message for part in ["--prompts", *parts]), message


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--prompts", "no_such.txt"], ["--prompts", "no_such.txt"]),
        (["--prompts", "prompts.csv"], ["--prompts", ".jsonl"]),
        (["--chat", "no_such.json"], ["--chat", "no file", '"role"']),
        (["--chat", "[1"], ["--chat", "not JSON"]),
        (["--chat", '["a"]'], ["--chat", '"role"']),
        (["--chat", "[]"], ["--chat", "list of messages"]),
        (["--chat", json.dumps(CHAT), "--prompt", "a"], ["--chat", "--prompt"]),
        (["--prompt", "\udcff"], ["--prompt", "UTF-8"]),
        (["--prompt", "a", "--prompt", ""], ["--prompt", "empty"]),
        (["--chat", '{"messages": []}'], ["--chat", "messages: expected a list"]),
        (["--chat", '{"messages": [], "tool": []}'], ["--chat", "'tool'"]),
        (["--chat", json.dumps({"messages": CHAT, "tools": 3})], ["--chat", "tools: expected a list"]),
        (["--chat", json.dumps(CHAT), "--chat-template-kwargs", "[]"], ["--chat-template-kwargs", "an object", "[]"]),
        (["--prompt", "a", "--chat-template-kwargs", "{}"], ["--chat-template-kwargs:", "--chat "]),
        (
            ["--chat", json.dumps({"messages": CHAT, "tools": []}), "--chat-template-kwargs", '{"tools": []}'],
            ["--chat-template-kwargs:", "tools of its own"],
        ),
        (["--prompt", "a", "--batch-size", "0"], ["--batch-size", "'0'"]),
    ],
)
def test_errors_come_before_any_model(capsys, monkeypatch, arguments, parts):
    monkeypatch.setattr("depass_fast.cli.attribute.engine_of", lambda *_: pytest.fail("a model was loaded"))
    message = fail(capsys, *TOKENS, *arguments)
    assert all(part in message for part in parts), message


def test_the_last_prompt_is_checked_before_the_first_is_decomposed(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(DePass, "attribute", lambda *_, **__: pytest.fail("work was done"))
    path = tmp_path / "prompts.jsonl"
    path.write_text('"a"\n{"input_ids": [1, 99999]}')
    assert main([*TOKENS, "--prompts", str(path)]) == 2
    message = capsys.readouterr().err
    assert "--prompts: prompt 2: id 99999 is outside the vocabulary" in message
    for line, arguments, expected in (
        ('{"prompt": "b", "target": " nonesuch"}', [], "--prompts: prompt 2: target: ' nonesuch' is"),
        ('{"prompt": "b", "target": 99999}', [], "--prompts: prompt 2: target: id 99999"),
        ('{"prompt": "b", "target": [3, 4]}', ["--contrast-id", "5"], "--contrast-id: it is subtracted"),
        ('"b"', ["--position", "2"], "--position: prompt 2: 2 is out of range"),
        ('"b"', ["--target", " nonesuch"], "--target: ' nonesuch' is"),
        ('"b"', ["--continuation-ids", "99999"], "--continuation-ids: prompt 1: id 99999"),
    ):
        path.write_text(f'"Nyria Morstam speaks"\n{line}')
        assert main([*TOKENS, "--prompts", str(path), *arguments]) == 2
        assert expected in capsys.readouterr().err
    path.write_text('{"prompt": "a", "continuation": "b"}\n{"prompt": "a", "continuation": [99999]}')
    assert main([*TOKENS, "--prompts", str(path)]) == 2
    assert "--prompts: prompt 2: continuation: id 99999" in capsys.readouterr().err
    path.write_text('{"prompt": "a", "target": 3}')
    assert "--target: the lines" in fail(capsys, *TOKENS, "--prompts", str(path), "--target", "b")


def test_a_chat_that_the_template_refuses(capsys, monkeypatch, engine):
    model, tokenizer = load_demo()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    monkeypatch.setattr("depass_fast.demo.load_demo", lambda *_: (model, tokenizer))
    assert main([*TOKENS, "--chat", json.dumps(CHAT)]) == 2
    message = capsys.readouterr().err
    assert "--chat: " in message and "roles must alternate" in message
