"""Attention held at a trace's, effects split into their two parts, and the study `freezing`."""

from __future__ import annotations

import json
import threading

import pytest
import torch

from depass_fast import DePass
from depass_fast.demo import load_demo
from depass_fast.evaluate import synthetic
from depass_fast.evaluate.frozen import frozen_attention
from depass_fast.evaluate.interventions import HEADS, NEURONS, next_logits, replacement_id
from depass_fast.evaluate.left_out import REPLACED, ZEROED, drawn_heads, drawn_neurons, effects
from depass_fast.evaluate.questions import Question, answered, read_texts
from depass_fast.evaluate.run import run
from depass_fast.evaluate.studies.freezing import FIGURES, FreezingStudy, synthetic_table
from depass_fast.evaluate.study import Settings
from tests.support.family_models import available, build_variant
from tests.support.models import build, random_ids

FAMILIES = ["gpt2", "gemma2: tight caps", "gemma3_text", "gpt_oss", "deepseek_v3"]
IDS = random_ids(8)


@pytest.fixture(scope="module")
def demo() -> DePass:
    return DePass(*load_demo(), progress=False)


@pytest.fixture(scope="module")
def question(demo) -> Question:
    return next(found for found in answered(demo, read_texts(None)) if found is not None)


def rows(count: int = 1) -> torch.Tensor:
    return torch.tensor([IDS]).expand(count, -1)


# -- attention that is held -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_with_nothing_changed_it_is_the_ordinary_pass(name):
    if not available(name):
        pytest.skip(f"this transformers has no {name}")
    engine = DePass(build_variant(name))
    before, trace = next_logits(engine, rows(2)), engine.trace(IDS)
    implementation = engine.adapter.config._attn_implementation
    with frozen_attention(engine, trace):
        held = next_logits(engine, rows(2))
    torch.testing.assert_close(held, before, rtol=1e-5, atol=1e-5 * float(before.abs().max()))
    assert engine.adapter.config._attn_implementation == implementation
    assert torch.equal(next_logits(engine, rows(2)), before)


def test_nothing_reacts_to_queries_and_keys():
    engine = build("llama-gqa")
    trace, plain = engine.trace(IDS), next_logits(engine, rows())
    parts = [engine.model.get_submodule(f"model.layers.1.self_attn.{name}_proj") for name in ("q", "k")]
    hooks = [part.register_forward_hook(lambda module, args, output: output.flip(1)) for part in parts]
    try:
        assert not torch.allclose(next_logits(engine, rows()), plain, atol=1e-3)
        with frozen_attention(engine, trace):
            torch.testing.assert_close(next_logits(engine, rows()), plain, rtol=1e-5, atol=1e-5)
    finally:
        for hook in hooks:
            hook.remove()


def test_the_model_is_handed_back_after_an_error():
    engine = build("llama-gqa")
    before, trace, message = next_logits(engine, rows()), engine.trace(IDS), "ids: rows of 5 tokens; .* is held is of 8"
    with pytest.raises(ValueError, match=message), frozen_attention(engine, trace):
        next_logits(engine, rows()[:, :5])
    assert torch.equal(next_logits(engine, rows()), before)


def test_another_thread_is_told():
    engine, raised = build("llama-gqa"), []

    def other() -> None:
        try:
            next_logits(engine, rows())
        except RuntimeError as error:
            raised.append(str(error))

    with frozen_attention(engine, engine.trace(IDS)):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert raised == ["another thread holds this model's attention frozen; run it when that is done."]


def test_what_cannot_be_held_is_refused():
    engine = build("llama-gqa")
    for given, message in (
        (engine.trace([IDS, IDS]), "trace: it holds 2 prompts"),
        (build("llama-mha").trace(IDS), "trace: it was made by another model"),
    ):
        with pytest.raises(ValueError, match=message), frozen_attention(engine, given):
            pass


def test_attention_that_cannot_be_replaced_is_refused_at_once():
    engine = DePass(build_variant("gptj"))
    if engine.adapter.observed is None:
        pytest.skip("this transformers lets it be replaced")
    with pytest.raises(ValueError, match=r"model: its attention \(GPTJAttention\) does not go through"):
        FreezingStudy(engine, Settings())


# -- effects and their parts ------------------------------------------------------------------------------------------


def test_the_parts_of_known_effects():
    """Steers change attention alone, payloads without a key none, and the shares are the frozen parts."""
    found = synthetic_table()
    assert found.keys() == synthetic.expected().keys()
    for frozen, attention, measured_frozen, measured_attention, share in found.values():
        assert [measured_frozen, measured_attention, share] == pytest.approx([frozen, attention, frozen], abs=1e-5)
    steer, payload = found["a steer"], found["a payload"]
    assert steer[0] == payload[1] == 0 and min(steer[1], payload[0]) > 0.1
    for mixed in ("a key and a payload", "a steer and a payload", "L0H1, steers and copies"):
        assert min(abs(found[mixed][0]), abs(found[mixed][1])) > 0.1


def test_effects_are_those_of_actual_runs(demo, question):
    trace, at = demo.trace(question.ids), torch.tensor([1, 3])
    whole = question.values(next_logits(demo, question.ids[None]))[0]
    replaced, zeroed = [], []
    for position in at.tolist():
        ids = question.ids.clone()
        ids[position] = replacement_id(demo)
        replaced.append(next_logits(demo, ids[None]))
        embedded = demo.adapter.embedding(question.ids)[None].clone()
        embedded[0, position] = 0
        zeroed.append(demo.model(inputs_embeds=embedded).logits[:, -1].detach())
    for kind, logits in ((REPLACED, replaced), (ZEROED, zeroed)):
        found = effects(demo, question, trace, kind, at)
        torch.testing.assert_close(found.total, whole - question.values(torch.cat(logits)), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.frozen + found.attention, found.total)
        assert found.rounding < 1e-4


@pytest.mark.parametrize("kind", [HEADS, NEURONS])
def test_nothing_attends_behind_the_last_layer(demo, question, kind):
    last = demo.adapter.n_layers - 1
    found = effects(demo, question, demo.trace(question.ids), kind, torch.tensor([[last, 0], [last, 2], [0, 1]]))
    assert found.total.shape == found.frozen.shape == (3, 3)
    torch.testing.assert_close(found.frozen[:2], found.total[:2], rtol=1e-4, atol=1e-4)
    assert float(found.attention[2].abs().max()) > 1e-3


def test_components_are_drawn():
    engine = build("llama-gqa")  # 3 layers of 4 heads

    def heads(count: int) -> list[list[int]]:
        return drawn_heads(engine, count, torch.Generator().manual_seed(0)).tolist()

    assert heads(6) == heads(6) and [layer for layer, _ in heads(6)] == [0, 0, 1, 1, 2, 2]
    assert [layer for layer, _ in heads(1)] == [0, 1, 2]
    assert heads(99) == [[layer, head] for layer in range(3) for head in range(4)]
    sizes = torch.tensor([[0.0, 1.0, 1e-3], [0.0, 5.0, 0.0]])
    drawn = drawn_neurons(sizes, 16, torch.Generator().manual_seed(0))
    assert sorted(drawn.tolist()) == [[0, 1], [0, 2], [1, 1]]


# -- the study --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result(demo) -> dict:
    found = run(FreezingStudy(demo, Settings(prompts=2, quick=True)), model="demo", progress=False)
    return json.loads(json.dumps(found))


def test_the_summary_is_of_the_rows(result):
    assert tuple(result["figures"]) == FIGURES
    for kind in (REPLACED, ZEROED, HEADS, NEURONS):
        each = [dict(zip(FIGURES, row["effects"][kind]["contrast"], strict=True)) for row in result["rows"]]
        found = result["summary"][kind]["contrast"]
        parts = [(one["frozen"], one["attention"]) for one in each]
        assert found["explained"]["mean"] == pytest.approx(sum(f / (f + a) for f, a in parts) / 2, rel=1e-4)
        for name in ("total", "frozen ~ total, Spearman"):
            assert found[name]["mean"] == pytest.approx(sum(one[name] for one in each) / 2, rel=1e-4)
    assert result["summary"][NEURONS]["contrast"]["softmax share"]["mean"] is None
    layers = result["summary"]["layers"]
    assert len(layers) == 6 and layers[-1]["explained"]["mean"] == pytest.approx(1, abs=1e-3)
    assert max(row["rounding"] for row in result["rows"]) < 1e-4


def test_the_tables_and_the_picture(result):
    known, sizes, agreement = FreezingStudy.tables(result)
    assert [row[0] for row in known.rows] == list(synthetic.expected())
    assert [row[:2] for row in sizes.rows][:2] == [[REPLACED, "contrast"], [REPLACED, "log-prob"]]
    assert [NEURONS, "shapley ~ total"] in [row[:2] for row in agreement.rows]
    assert [NEURONS, "softmax ~ total"] not in [row[:2] for row in agreement.rows]
    parts, explained = FreezingStudy.panels(result)
    assert set(parts.lines) == {"total", "frozen", "attention"} and list(explained.lines) == ["explained"]
    assert all(len(x) == len(y) == 6 for x, y in parts.lines.values())


def test_a_mixture_has_no_neurons():
    study = FreezingStudy(DePass(build_variant("mixtral")), Settings())
    assert study.kinds == (REPLACED, ZEROED, HEADS)
