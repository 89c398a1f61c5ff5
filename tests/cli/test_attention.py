"""``depass-fast attention``, and the second book of ``depass-fast ledger``."""

import json

import pytest

from depass_fast import AttentionCredit, AttentionExplanation
from depass_fast.cli.main import main
from tests.support.command import one_thread, run  # noqa: F401 (a fixture)

DEMO = [
    "attention",
    "--model",
    "demo",
    "--device",
    "cpu",
    "--prompt",
    "When Diane met Grace at the park, Grace handed the",
]


def test_one_head(capsys, tmp_path):
    out = tmp_path / "why.safetensors"
    text = run(capsys, *DEMO, "--layer", "4", "--head", "4", "--pairs", "2", "--top", "3", "--out", str(out))
    assert "layer 4, head 4: why" in text and "leading pairs, query · key" in text
    assert text.splitlines()[3].split()[:2] == ["key", "P"] and text.splitlines()[3].count("@") == 3
    assert AttentionExplanation.load(out).heads == [4]


def test_several_heads_two_keys_and_other_components(capsys):
    text = run(
        capsys,
        *DEMO,
        "--layer",
        "-1",
        "--head",
        "1,3",
        "--key",
        "2,4",
        "--components",
        "heads",
        "--start",
        "2",
        "--json",
    )
    found = json.loads(text)
    assert (
        found["heads"] == [1, 3] and found["keys"] == [2, 4] and found["components"] == "heads" and found["start"] == 2
    )
    assert len(found["query_side"]) == 2 and len(found["query_side"][0]) == 2


def test_credit(capsys, tmp_path):
    out = tmp_path / "credit.csv"
    target = ["--target", " camera", "--contrast", " map"]
    text = run(capsys, *DEMO, "--credit", *target, "--rule", "half", "--top", "2", "--out", str(out))
    assert "by looking where they look" in text and "| half |" in text
    assert out.read_text().splitlines()[0] == "target,layer,head,label,credit"
    whole = tmp_path / "credit.safetensors"
    found = json.loads(run(capsys, *DEMO, "--credit", *target, "--json", "--out", str(whole)))
    assert found["rule"] == "shapley" and AttentionCredit.load(whole).labels == found["labels"]


def test_the_second_book_of_a_ledger(capsys, tmp_path):
    command = ["ledger", *DEMO[1:], "--attention", "--kinds", "heads,tokens"]
    text = run(capsys, *command, "--top", "2")
    assert text.count("heads at 6 layers") == 2 and "credit of attention" in text
    found = json.loads(run(capsys, *command, "--json", "--out", str(tmp_path / "both.csv")))
    assert found["steered"]["heads"]["layers"][0]["labels"][0] == "L0H0"
    lines = (tmp_path / "both.csv").read_text().splitlines()
    assert lines[0] == "kind,layer,label,score,steered" and lines[1].count(",") >= 4


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "--layer: say whose attention is to be explained"),
        (["--layer", "all"], "--layer: one layer at a time"),
        (["--layer", "9"], "--layer: 9 is out of range; this model has layers 0 to 5"),
        (["--layer", "1", "--head", "8"], "--head: 8 is out of range; layer 1 has 8 heads"),
        (["--layer", "1", "--key", "99"], "--key: 99 is out of range"),
        (["--layer", "1", "--query", "2", "--key", "4"], "--key: 4 is behind the query at position 2"),
        (["--layer", "1", "--key", "1,2,3"], "--key: one position, or two"),
        (["--layer", "1", "--components", "heads"], "--start: heads belong to a layer"),
        (["--layer", "1", "--components", "heads", "--start", "3"], "--layer: the attention of layer 1 reads none"),
        (["--layer", "1", "--components", "heads", "--start", "all"], "--start: components start at one layer"),
        (["--layer", "1", "--target", " map"], "--target: it belongs to --credit"),
        (["--layer", "1", "--rule", "half"], "--rule: it belongs to --credit"),
        (["--credit", "--head", "1"], "--head: --credit is of all heads"),
        (["--credit", "--query", "1"], "--query: --credit is of all heads"),
        (["--credit", "--position", "1,2"], "--position: the credit is of one position"),
        (["--credit", "--components", "heads", "--start", "5"], "--components: they start behind the last attention"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_flags(capsys, flags, message):
    assert main([*DEMO, *flags]) == 2
    assert message in capsys.readouterr().err
