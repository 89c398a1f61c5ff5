"""A ledger in print: its leading components of all kinds, as text, in colour, ranked, and as plain values."""

import json
import math

import pytest
import torch
from rich.console import Console

from depass_fast import LogProb
from tests.support.models import build, random_ids

PROMPT = "When Diane met Grace at the park, Grace handed the camera to"
IDS, OTHER = random_ids(7), random_ids(4, seed=1)


@pytest.fixture(scope="module")
def ledger(demo):
    return demo.ledger(PROMPT, LogProb(" Diane"))


def in_colour(view):
    console = Console(width=100, force_terminal=True, color_system="truecolor", record=True)
    with console.capture() as captured:
        console.print(view)
    return captured.get()


def test_a_view_has_a_few_of_each_kind(ledger):
    text = str(ledger)
    first, about, *_ = text.splitlines()
    assert first.startswith("log P(' Diane'), P frozen at position 13 (after ' to'): log P + entropy ")
    assert about.startswith("ledger | shapley | cpu, float32 | completeness error ")
    titles = [line for line in text.splitlines() if " at " in line][1:]
    assert titles == ["tokens at layer 0", "modules at 6 layers", "heads at 6 layers", "neurons at 6 layers"]
    for kind in ("tokens", "modules", "heads", "neurons"):
        for entry in ledger.top(5, kinds=[kind]):
            assert f"  {entry.label} " in text
    assert "others" in text and "sum" in text and len(text.splitlines()) < 40
    assert "view(" not in text  # there are no others


def test_a_view_in_colour_has_the_same(ledger):
    text = in_colour(ledger)
    for entry in ledger.top(5, kinds=["heads"]) + ledger.top(5, kinds=["neurons"]):
        assert entry.label in text
    assert "48;2;" in text  # the prompt's tokens have backgrounds
    few = in_colour(ledger.view(2, kinds=["heads"]))
    assert "neurons" not in few and "48;2;" not in few and ledger.top(3, kinds=["heads"])[2].label not in few


def test_a_view_says_which_of_several_it_shows():
    ledger = build("llama-biases").ledger([IDS, OTHER], targets=[[1, 2], 3], position=[-1, 0])
    assert "prompt 0 of 2, read 0 of 2, target 0 of 2; view(prompt=, read=, target=) shows others" in str(ledger)
    second = str(ledger.view(kinds=["heads"], prompt=0, read=1, target=1))
    assert second.startswith("id 2 at position 0 ") and "prompt 0 of 2, read 1 of 2, target 1 of 2" in second
    last = str(ledger.view(prompt=-1))
    assert last.startswith("id 3 at position 3 ") and "prompt 1 of 2, read 0 of 2; view" in last
    assert "bias" in last and str(ledger.view(1, kinds=[])).startswith("prompt 0 of 2")


def test_tokens_behind_the_position_have_no_rows():
    ledger = build("llama-biases").ledger([IDS, OTHER], [1, 2], position=[2, -1])
    table = str(ledger.view(20, kinds=["tokens"], target=1)).split("\n\n")[1].splitlines()
    assert table[0] == "tokens at layer 0" and sorted(line.split("@")[1][0] for line in table[1:4]) == ["0", "1", "2"]
    assert [line.split()[0] for line in table[4:]] == ["bias", "sum"]
    assert str(ledger.view(20, kinds=["tokens"], read=-1)).count("@") == 7
    assert in_colour(ledger.view(20, kinds=["tokens"])).count("@") == 3


def test_an_encoding_that_lacks_characters(ledger, monkeypatch):
    monkeypatch.setattr("depass_fast.runtime.terminal.output_encoding", lambda: "ascii")
    assert "####" in str(ledger) and str(ledger).isascii()


def test_a_repr_is_short():
    dp = build("llama-gqa")
    many = dp.ledger([IDS[: 1 + n % 7] for n in range(60)], [list(range(9)), torch.ones(32)][0], position=[0, 0, 0])
    text = repr(many)
    assert len(text) <= 2000 and text.startswith("Ledger(shapley, prompts of [1, 2, 3, 4, ... 60 in all] tokens")
    assert "7 sites" in text and text.endswith("1.4 MiB)")


def test_the_leading_components_of_all_kinds_and_layers(ledger):
    found = ledger.top(12)
    assert len(found) == 12 and {entry.kind for entry in found} <= {"tokens", "heads", "neurons"}
    sizes = [abs(entry.score) for entry in found]
    assert sizes == sorted(sizes, reverse=True)
    tokens = ledger.tokens()
    every = [(label, "tokens", 0, score) for label, score in zip(tokens.labels, tokens.scores.tolist(), strict=True)]
    for kind in ("heads", "neurons"):
        for one in getattr(ledger, kind)():
            named = len(one.labels) - one.n_extras
            scores = one.scores.tolist()[:named]
            every += [(label, kind, one.layer, score) for label, score in zip(one.labels, scores, strict=False)]
    every = [entry for entry in every if entry[0] not in ("rest", "bias")]
    assert [entry.score for entry in found] == [e[3] for e in sorted(every, key=lambda e: -abs(e[3]))[:12]]
    largest = ledger.top(3, by="positive")
    assert [e.score for e in largest] == sorted((e[3] for e in every), reverse=True)[:3]
    assert [e.score for e in ledger.top(3, by="negative")] == sorted(e[3] for e in every)[:3]
    assert ledger.top(3, kinds=["modules"])[0].label.startswith("L") and ledger.top(3, kinds=[]) == []
    label, kind, layer, score = found[0]
    assert getattr(ledger, kind)(layer).score(label) == score


def test_top_takes_one_prompt_read_and_target():
    dp = build("llama-gqa")
    ledger = dp.ledger([IDS, OTHER], [1, 2], position=[-1, 1])
    alone = dp.ledger(OTHER, 2, position=1).top(5)
    found = ledger.top(5, prompt=1, read=1, target=1)
    assert [entry.label for entry in found] == [entry.label for entry in alone]
    assert all(math.isclose(one.score, other.score, abs_tol=1e-5) for one, other in zip(found, alone, strict=True))


def test_plain_values(ledger):
    values = json.loads(json.dumps(ledger.to_dict()))
    assert values["rule"] == "shapley" and values["target"] == "log P(' Diane'), P frozen"
    assert values["target_kind"] == "log-prob" and values["position"] == 13 and values["method"] == "adjoint"
    assert values["completeness_error"] == ledger.completeness_error and values["provenance"]["depass_fast"]
    tokens = ledger.tokens()
    assert values["tokens"] == {
        "layer": 0,
        "site": "resid_pre",
        "labels": tokens.labels,
        "scores": tokens.scores.tolist(),
    }
    heads = values["heads"]["layers"]
    assert [one["layer"] for one in heads] == [0, 1, 2, 3, 4, 5]
    assert heads[3]["labels"] == ledger.heads(3).labels and heads[3]["scores"] == ledger.heads(3).scores.tolist()
    assert len(values["neurons"]["layers"][0]["labels"]) >= 512 and len(values["modules"]["layers"]) == 6
    assert list(ledger.to_dict(kinds=["heads"]))[-1] == "heads" and "neurons" not in ledger.to_dict(kinds=["heads"])


def test_plain_values_of_one_of_several():
    ledger = build("llama-gqa").ledger([IDS, OTHER], targets=[[1, 2], 3], position=[-1, 1])
    with pytest.raises(ValueError, match="prompt: this ledger holds 2; choose one, from 0 to 1"):
        ledger.to_dict()
    with pytest.raises(ValueError, match="read: this ledger holds 2; choose one, from 0 to 1"):
        ledger.to_dict(prompt=1)
    values = ledger.to_dict(prompt=0, read=1, kinds=["tokens"])
    assert values["target_id"] == [1, 2] and values["input_ids"] == IDS and values["position"] == 1
    assert len(values["tokens"]["scores"]) == 2 and ledger.to_dict(prompt=1, read=0)["target_id"] == 3
