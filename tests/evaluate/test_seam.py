"""Data files, questions, interventions, intervals, tables."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from depass_fast import Contrast, DePass, LogProb
from depass_fast.demo import load_demo
from depass_fast.evaluate import interventions, statistics
from depass_fast.evaluate.methods.gradients import gradient_times_activation
from depass_fast.evaluate.questions import Text, answered, first_token, read_texts, spaced
from depass_fast.evaluate.tables import Table, figure
from depass_fast.inputs.records import read_records
from tests.support.family_models import build_model
from tests.support.models import random_ids


@pytest.fixture(scope="module")
def demo() -> DePass:
    return DePass(*load_demo(), progress=False)


@pytest.fixture(scope="module")
def small() -> DePass:
    return DePass(build_model("llama", num_key_value_heads=2), progress=False)


# -- data files -----------------------------------------------------------------------------------------------------

FAULTS = {
    '[{"prompt": "a", "answer": "b"},\n\n {"prompt": 1, "answer": "b"}]': "line 3: the field 'prompt' is int, expected",
    '{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n': "line 2: the field 'answer' or 'attribute' or 'target_token'",
    '{"answer": "b"}': "line 1: the field 'prompt' is missing; there are answer",
    '[{"prompt": "a", "answer": ""}]': "line 1: the field 'answer' is empty",
    '[{"prompt": true, "answer": "b"}]': "line 1: the field 'prompt' is bool",
    "[1, 2]": "line 1: expected an object with fields, got int",
    '[{"prompt": "a", "answer": "b"}\n{}]': "line 2: no JSON .expected a comma",
    '[{"prompt": "a", "answer": "b"}]\n]': "line 2: no JSON .something follows",
    '[{"prompt": "a", "answer": "b"}': "line 1: no JSON",
    '{"prompt": "a",\n "answer" "b"}': "line 2, column 11: no JSON",
    "": "it holds no objects",
    "[]": "it holds no objects",
}


@pytest.mark.parametrize(("content", "message"), FAULTS.items(), ids=range(len(FAULTS)))
def test_a_faulty_file_is_refused_by_line_and_field(tmp_path, content, message):
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"data.json.*{message}"):
        read_texts(path)


def test_a_file_of_another_encoding_is_refused(tmp_path):
    path = tmp_path / "data.json"
    path.write_bytes('[{"prompt": "é"}]'.encode("latin-1"))
    with pytest.raises(ValueError, match="no text in UTF-8"):
        read_records(path, {"prompt": str})


@pytest.mark.parametrize("name", ["answer", "attribute", "target_token"])
@pytest.mark.parametrize("as_lines", [False, True])
def test_lists_and_lines_are_read(tmp_path, name, as_lines):
    records = [{"prompt": f"p{i}", name: f"a{i}"} for i in range(3)]
    path = tmp_path / "data.json"
    path.write_text("\n".join(map(json.dumps, records)) if as_lines else json.dumps(records, indent=1))
    assert read_texts(path) == [Text(f"p{i}", f"a{i}") for i in range(3)]


# -- questions ------------------------------------------------------------------------------------------------------


def test_questions_are_those_that_the_model_answers(demo):
    texts = read_texts(None, count=3)
    found = list(answered(demo, [texts[0], Text(texts[1].prompt, "camera"), texts[2]]))
    assert found[1] is None
    question = found[0]
    with torch.no_grad():
        logits = demo.model(question.ids[None]).logits[0, -1]
    assert logits.topk(2).indices.tolist() == [question.target, question.foil]
    assert question.special.tolist() == [True] + [False] * (len(question.ids) - 1)
    assert [type(one) for one in question.targets] == [int, LogProb, Contrast]
    assert [one.number for one in answered(demo, texts, first=1) if one] == [1, 2]


def test_an_answer_is_spaced_where_words_need_it():
    with_space, without = (
        ("is", "capital,", "a 'good'", 'say "so"', "3"),
        ("is '", '"', "is ", "is\n", "(", "well-", ""),
    )
    assert all(spaced(prompt, "Paris") == spaced(prompt, " Paris") == " Paris" for prompt in with_space)
    assert all(spaced(prompt, "Paris") == "Paris" for prompt in without)


def test_the_boundary_of_a_word_is_no_first_token():
    class Tokenizer:
        def encode(self, text, add_special_tokens):
            return [29871, 3681] if text.startswith(" ") else [3681]

        def decode(self, ids):
            return "" if ids == [29871] else "Paris"

    assert first_token(Tokenizer(), " Paris") == first_token(Tokenizer(), "Paris") == 3681


def test_text_needs_a_tokenizer(small):
    with pytest.raises(ValueError, match="tokenizer: the prompts are texts"):
        next(answered(small, [Text("a", "b")]))


# -- interventions --------------------------------------------------------------------------------------------------


def test_rows_of_any_length_run_together(small):
    ids = random_ids(6)
    rows = [tuple(ids), tuple(ids[:3]), tuple(ids), tuple(ids[3:])]
    found = interventions.log_probs_after(small, rows, 5)
    with torch.no_grad():
        for row in rows:
            expected = small.model(torch.tensor([row])).logits[0, -1].log_softmax(-1)[5]
            assert found[row] == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_masks_silence_what_they_name_and_nothing_else(small, kind, monkeypatch):
    """All masked is what the model says with that projection's weights at zero; values put back change nothing."""
    monkeypatch.setattr(interventions, "TOKENS_AT_ONCE", 12)  # two masks at a time
    ids, adapter = torch.tensor(random_ids(6)), small.adapter
    width = interventions.widths(small, kind)[0]
    masks = torch.zeros(3, adapter.n_layers, width, dtype=torch.bool)
    masks[1] = True
    masks[2, 1, width // 2] = True
    found = interventions.masked_logits(small, ids, masks, kind)
    with torch.no_grad():
        clean = small.model(ids[None]).logits[0, -1]
        weights = [adapter.module(i, interventions.PARTS[kind]).weight for i in range(adapter.n_layers)]
        kept, size = [w.clone() for w in weights], weights[0].shape[1] // width
        try:
            weights[1][:, width // 2 * size : (width // 2 + 1) * size] = 0
            one = small.model(ids[None]).logits[0, -1]
            for weight in weights:
                weight.zero_()
            silent = small.model(ids[None]).logits[0, -1]
        finally:
            for weight, before in zip(weights, kept, strict=True):
                weight.copy_(before)
    torch.testing.assert_close(found, torch.stack([clean, silent, one]), rtol=1e-5, atol=1e-5)
    values = interventions.recorded(small, ids, kind)
    assert [v.shape for v in values] == [(6, width, size)] * adapter.n_layers
    put_back = interventions.masked_logits(small, ids, masks, kind, torch.stack(values))
    torch.testing.assert_close(put_back, clean.expand(3, -1), rtol=1e-5, atol=1e-5)
    assert not any(m._forward_pre_hooks for m in small.model.modules())


def test_mlps_that_see_all_positions_in_a_row_are_masked_all_the_same():
    """OPT's MLP runs on (B·N, W): masks of a batch are those of one after the other, and no position is lost."""
    engine, ids = DePass(build_model("opt"), progress=False), torch.tensor(random_ids(5))
    width = interventions.widths(engine, "neurons")[0]
    masks = torch.rand(3, engine.adapter.n_layers, width, generator=torch.Generator().manual_seed(0)) > 0.5
    together = interventions.masked_logits(engine, ids, masks, "neurons")
    alone = [interventions.masked_logits(engine, ids, mask[None], "neurons") for mask in masks]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)
    acts = interventions.recorded(engine, ids, "neurons")
    trace = engine.trace(ids)
    for act, layer in zip(acts, trace.layers, strict=True):
        torch.testing.assert_close(act[..., 0], layer.mlp.act, rtol=1e-4, atol=1e-6)
    read = gradient_times_activation(engine, ids, lambda logits: logits[:2])
    assert read["neurons"].shape == (2, engine.adapter.n_layers, width) and read["tokens"].shape == (2, 5)


def test_neurons_of_experts_are_refused():
    engine = DePass(build_model("mixtral"), progress=False)
    masks = torch.zeros(1, engine.adapter.n_layers, 48, dtype=torch.bool)
    with pytest.raises(ValueError, match="mixture of experts"):
        interventions.masked_logits(engine, torch.tensor(random_ids(4)), masks, "neurons")


# -- statistics and tables ------------------------------------------------------------------------------------------


def test_intervals_hold_the_mean_of_most_samples():
    draw, held = np.random.default_rng(0), 0
    for seed in range(200):
        found = statistics.mean(draw.normal(1.0, 2.0, size=60).tolist(), seed)
        assert found["n"] == 60 and found["low"] < found["mean"] < found["high"]
        held += found["low"] < 1.0 < found["high"]
    assert 180 <= held <= 198  # of 200: 95 %


def test_few_values_have_no_interval():
    assert statistics.mean([0.0, 1.0, float("nan")]) == {"mean": 0.5, "low": None, "high": None, "n": 2}
    assert statistics.mean([])["mean"] is None
    assert statistics.difference([1.0, 2.0], [0.0, 0.0])["significant"] is None


def test_differences_are_paired():
    """Two methods that vary with the prompts and differ by 0.1 on each."""
    base = np.random.default_rng(0).normal(size=40)
    found = statistics.difference((base + 0.1).tolist(), base.tolist())
    assert found["mean"] == pytest.approx(0.1) and found["significant"] is True
    noise = np.random.default_rng(1).normal(size=40)
    assert statistics.difference(base.tolist(), noise.tolist())["significant"] is False


def test_agreement_of_scores():
    a = torch.tensor([1.0, 2.0, 3.0, -4.0])
    assert statistics.pearson(a, 2 * a + 1) == pytest.approx(1.0)
    assert np.isnan(statistics.pearson(a, torch.ones(4)))
    assert statistics.top_overlap(a, torch.tensor([0.0, 0.0, 1.0, 2.0]), 2) == 1.0
    assert statistics.top_overlap(a, torch.tensor([2.0, 1.0, 0.0, 0.0]), 2) == 0.0


def test_tables_in_print_and_in_markdown():
    table = Table("Title", ["name", "figure"], [["long name", "1"], ["b", "0.5 [0.1, 0.9]"]], note="Note.")
    assert table.plain().splitlines() == [
        "Title. Note.",
        "",
        "name               figure",
        "long name               1",
        "b          0.5 [0.1, 0.9]",
    ]
    assert table.markdown().startswith("**Title.** Note.\n\n| name | figure |\n| --- | ---: |\n| long name | 1 |")
    assert figure({"mean": 0.5, "low": 0.1, "high": 0.9}, 1) == "0.5 [0.1, 0.9]"
    assert figure({"mean": 0.5, "low": None, "high": None}) == "0.500" and figure(statistics.mean([])) == "-"
