"""Heads that look elsewhere, tokens taken out of their input, and the study `attention`."""

from __future__ import annotations

import json
import threading

import pytest
import torch

from depass_fast import DePass, Tokens
from depass_fast.demo import load_demo
from depass_fast.evaluate import qk_circuits
from depass_fast.evaluate.head_case import BOOK, HELD, KEY_LOG_P, LOGIT, REACT
from depass_fast.evaluate.interventions import next_logits
from depass_fast.evaluate.relooked import looking, probabilities_of, sides_without
from depass_fast.evaluate.run import run
from depass_fast.evaluate.studies.attention import FIGURES, AttentionStudy
from depass_fast.evaluate.study import Settings
from depass_fast.looking.freeze import freeze_sides
from depass_fast.looking.turned import turns_of
from depass_fast.looking.without import BOTH, KEY, QUERY
from tests.support.family_models import available, build_variant
from tests.support.models import build, random_ids

FAMILIES = ["llama: GQA", "gemma2: tight caps", "gemma3_text", "gpt2", "gpt_oss", "deepseek_v3"]
IDS = random_ids(8)


@pytest.fixture(scope="module")
def demo() -> DePass:
    return DePass(*load_demo(), progress=False)


def sides_of(engine: DePass, trace, layer: int):
    record = trace.layers[layer].attention
    turns = turns_of(engine.adapter, [torch.tensor(IDS)], [layer])[0][layer]
    return freeze_sides(engine.adapter, layer, record, trace.span(0), turns, torch.float32)


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_a_head_that_looks_where_it_did_changes_nothing(name):
    if not available(name):
        pytest.skip(f"this transformers has no {name}")
    engine = DePass(build_variant(name))
    trace, rows = engine.trace(IDS), torch.tensor([IDS, IDS])
    before, implementation = next_logits(engine, rows), engine.adapter.config._attn_implementation
    p = probabilities_of(sides_of(engine, trace, 1), trace.layers[1].attention, 3)
    with looking(engine, trace, 1, 3, torch.stack([p, p.roll(1, 1)])):
        found = next_logits(engine, rows)
    torch.testing.assert_close(found[0], before[0], rtol=1e-4, atol=1e-5 * float(before.abs().max()))
    assert not torch.allclose(found[1], before[1], atol=1e-4)
    assert engine.adapter.config._attn_implementation == implementation
    assert torch.equal(next_logits(engine, rows), before)


def test_another_thread_is_told(demo):
    trace = demo.trace("When Diane met Grace")
    errors = []

    def elsewhere() -> None:
        try:
            next_logits(demo, trace.input_ids[None])
        except RuntimeError as error:
            errors.append(str(error))

    with looking(demo, trace, 0, 0, torch.eye(trace.length(0))[None]):
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert errors and "another thread has a head of this model look elsewhere" in errors[0]


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama: GQA", "qwen3", "gemma3_text", "cohere: QK norms"])
def test_what_is_left_of_queries_and_keys_is_the_models(name):
    """Without a token's part, queries and keys are those of a residual stream that lacks it."""
    if not available(name):
        pytest.skip(f"this transformers has no {name}")
    engine = DePass(build_variant(name))
    trace = engine.trace(IDS)
    x, sides = trace.layers[0].attention.resid, sides_of(engine, trace, 0)
    part = torch.zeros_like(x)
    part[3] = x[3] - 2 * x[5]
    left = sides_without(sides, x, part, BOTH)
    other = sides_without(sides, x, torch.zeros_like(x), BOTH)
    torch.testing.assert_close(other.q, sides.q, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(other.k, sides.k, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(left.q[3], sides.q[3]) and torch.allclose(left.q[4], sides.q[4], atol=1e-5)
    assert torch.equal(sides_without(sides, x, part, KEY).q, sides.q) and torch.equal(
        sides_without(sides, x, part, QUERY).k, sides.k
    )
    held = sides_without(sides, x, x, BOTH, norms_react=False)  # nothing but constants is left
    constant = torch.zeros_like(sides.q) if sides.of_q.constant is None else sides.of_q.constant
    torch.testing.assert_close(held.q, constant.expand_as(held.q), rtol=1e-4, atol=1e-4)


def test_heads_whose_reason_is_known():
    with torch.no_grad():
        found = qk_circuits.shares(*qk_circuits.build())
    assert set(found) == {"previous token", "duplicate token", "induction"}
    for row in found.values():
        assert row["query_side"] >= 0.95 and row["key_side"] >= 0.95 and row["probability"] > 0.3


@torch.no_grad()
def test_the_book_is_what_queries_lose_with_norms_held():
    """Taken out of the queries, with norms held, a token takes exactly its shares of the logits along."""
    engine = build("llama-gqa")
    trace = engine.trace(IDS)
    parts = engine.decompose(trace, Tokens(), end=1, allocation="shapley").dense()[:, : len(IDS)].transpose(0, 1)
    why = engine.explain_attention(trace, Tokens(), 1, 2, allocation="shapley")
    sides = sides_of(engine, trace, 1)
    x = trace.layers[1].attention.resid
    for m in (0, 4, 7):
        left = sides_without(sides, x, parts[m], QUERY, norms_react=False)
        p = probabilities_of(left, trace.layers[1].attention, 2)[-1]
        expected = (why.scores - why.query_side[:, m]).softmax(-1)
        torch.testing.assert_close(p, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama: GQA", "gemma3_text", "mistral: window", "gpt_oss", "gemma2: tight caps"])
@pytest.mark.parametrize("norms", ["react", "held"])
def test_without_is_what_the_study_measures(name, norms):
    if not available(name):
        pytest.skip(f"this transformers has no {name}")
    engine = DePass(build_variant(name))
    trace, head = engine.trace(IDS), 2
    parts = engine.decompose(trace, Tokens(), end=1, allocation="shapley").dense()[:, : len(IDS)].transpose(0, 1)
    why = engine.explain_attention(trace, Tokens(), 1, [head], allocation="shapley")
    record, sides = (
        trace.layers[1].attention,
        sides_of(engine, trace, 1),
    )
    for side in (QUERY, KEY, BOTH):
        found = why.without(side, norms, head)
        for m in range(len(IDS)):
            left = sides_without(sides, record.resid, parts[m], side, norms == "react")
            p = probabilities_of(left, record, head)[-1]
            torch.testing.assert_close(found[m], p, rtol=1e-3, atol=1e-5)


def test_a_row_and_its_summary(demo):
    study = AttentionStudy(demo, Settings(quick=True, prompts=2))
    items = [item for item in study.items() if item is not None][:2]
    rows = [study.measure(item) for item in items]
    assert all(len(row["heads"]) == 3 and row["heads"][0]["head"].startswith("L") for row in rows)
    name = f"{KEY_LOG_P}, {HELD}, {QUERY}, {BOOK}, Spearman"
    at = FIGURES.index(name)
    assert all(-1 <= head["figures"][at] <= 1 for row in rows for head in row["heads"])
    summary = study.summary(rows)
    assert summary[name]["n"] == 2 and {LOGIT in key for key in summary} == {True, False}
    assert f"{LOGIT}, {REACT}, {BOTH}, {BOOK}, Pearson" in summary


def test_the_study_runs(demo):
    found = run(AttentionStudy(demo, Settings(quick=True, prompts=2)), model="demo", progress=False)
    result = json.loads(json.dumps(found))
    tables = AttentionStudy.tables(result)
    assert len(tables) == 5 and "induction" in tables[0].markdown() and "norms held" in tables[2].title


def test_a_family_whose_attention_cannot_be_replaced_is_refused():
    if not available("bloom"):
        pytest.skip("this transformers has no BLOOM")
    engine = DePass(build_variant("bloom"))
    with pytest.raises(ValueError, match="does not go through transformers' attention interface"):
        AttentionStudy(engine, Settings(quick=True))
