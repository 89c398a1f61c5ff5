"""`bench.studies.rules`, its table, and `bench.speed.ledger`."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from bench.baselines.neuron_methods import AttributionPatching
from bench.report import rules as tables
from bench.report.page import report
from bench.speed import ledger as speed
from bench.studies.faithfulness import masked_predictions
from bench.studies.rules import __main__ as study
from bench.studies.rules.scores import both_reads, scores_of
from depass_fast import DePass
from depass_fast.demo import load_demo
from depass_fast.evaluate.erasure import deleted
from depass_fast.evaluate.masking import HIGHEST, LOWEST, masked, orders
from depass_fast.evaluate.methods.gradients import gradient_times_activation
from tests.support.family_models import build_model
from tests.support.models import random_ids

ROOT = Path(__file__).parents[2]
TARGET = 5


@pytest.fixture(scope="module")
def engine() -> DePass:
    return DePass(build_model("llama", num_key_value_heads=2))


def test_all_methods_score_all_components(engine):
    ids = torch.tensor(random_ids(6))
    found = scores_of(engine, ids, TARGET, seed=0)
    layers, heads = engine.adapter.n_layers, engine.adapter.attention(0).n_heads
    assert {scores.shape for scores in found.neurons.values()} == {(layers, 48)}
    assert {scores.shape for scores in found.heads.values()} == {(layers, heads)}
    assert {scores.shape for scores in found.tokens.values()} == {(6,)}
    assert found.neurons.keys() == found.heads.keys() and len(found.neurons) == 2 * 5 + 2
    assert all(scores.isfinite().all() for kind in (found.neurons, found.heads) for scores in kind.values())
    patching = AttributionPatching(engine.model)
    expected = patching.effects(ids, TARGET, range(layers), torch.zeros(layers, 48))
    torch.testing.assert_close(found.neurons["gradient × activation", "logit"], expected, rtol=1e-4, atol=1e-6)


def test_gradients_of_a_log_probability_are_those_of_its_direction(engine):
    """The gradient of log P is that of logit_t - Σ p_j logit_j, p frozen."""
    ids = torch.tensor(random_ids(6))
    tokens = gradient_times_activation(engine, ids, both_reads(TARGET), ["tokens"])["tokens"]
    with torch.no_grad():
        p = engine.model(ids[None]).logits[0, -1].softmax(-1)
    others = (p[:, None] * gradient_times_activation(engine, ids, lambda x: x, ["tokens"])["tokens"]).sum(0)
    torch.testing.assert_close(tokens[1], tokens[0] - others, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("part", "width"), [("down_proj", 48), ("o_proj", None)])
def test_masked_components_write_nothing(engine, part, width):
    """All masked is what the model says with that projection's weights at zero; nothing masked, what it says."""
    ids, layers = torch.tensor(random_ids(6)), engine.adapter.n_layers
    width = width or engine.adapter.attention(0).n_heads
    masks = torch.zeros(2, layers, width, dtype=torch.bool)
    masks[1] = True
    with torch.no_grad():
        clean = engine.model(ids[None]).logits[0, -1].argmax()
        found = masked_predictions(engine, ids, masks, part)
        weights = [engine.adapter.module(index, part).get_parameter("weight") for index in range(layers)]
        kept = [weight.clone() for weight in weights]
        try:
            for weight in weights:
                weight.zero_()
            silent = engine.model(ids[None]).logits[0, -1].argmax()
        finally:
            for weight, before in zip(weights, kept, strict=True):
                weight.copy_(before)
    assert found.tolist() == [int(clean), int(silent)]


def test_rankings_begin_with_the_lowest():
    scores = torch.tensor([[0.5, -2.0], [0.1, 1.0]])
    assert {name: order.tolist() for name, order in orders(scores, both=True)} == {
        "signed": [1, 2, 0, 3],
        "by size": [2, 0, 3, 1],
    }


def test_both_ends_are_masked(engine):
    ids, scores = torch.tensor(random_ids(6)), torch.rand(engine.adapter.n_layers, 48)
    found = masked(engine, ids, TARGET, "neurons", scores, both=False)
    assert found.keys() == {"by size"} and found["by size"].keys() == {LOWEST, HIGHEST}
    assert all(len(digits) == 5 and set(digits) <= {"0", "1"} for digits in found["by size"].values())


def test_deleting_the_tokens_that_matter(monkeypatch, engine):
    """A stand-in for the model: the answer's probability is the share of the prompt's second and third token kept."""
    ids, seen = torch.tensor([1, 7, 8, 9]), set()

    def log_probs_after(engine, rows, target):
        seen.update(rows)
        return {row: math.log(sum(token in (7, 8) for token in row) / 2 + 1e-9) for row in rows}

    monkeypatch.setattr("depass_fast.evaluate.erasure.log_probs_after", log_probs_after)
    best, worst = torch.tensor([9.0, 3.0, 2.0, 1.0]), torch.tensor([9.0, 1.0, 2.0, 3.0])
    found = deleted(engine, ids, TARGET, {1}, {("best", "-"): best, ("worst", "-"): worst})
    assert all(row[0] == 1 for row in seen) and (1,) in seen  # the special token stays
    assert found["best", "-"]["disrupt"] < found["worst", "-"]["disrupt"]
    assert found["best", "-"]["recover"] > found["worst", "-"]["recover"]
    assert min(len(one) for one in seen) == 1
    deleted(engine, ids, TARGET, set(), {("best", "-"): best})
    assert min(len(one) for one in seen) == 1  # one token stays


def test_a_run_that_was_cut_short_goes_on(monkeypatch, tmp_path, capsys):
    engine, out = DePass(*load_demo(), progress=False), tmp_path / "rules.json"
    monkeypatch.setattr(study, "load_demo", lambda: (engine.model, engine.tokenizer))
    measure, counted, found = study.measure, [], {}

    def once(engine, text, *args, **kwargs):
        counted.append(text)
        if len(counted) == 2:
            raise KeyboardInterrupt
        found.update(found or measure(engine, text, *args, **kwargs))
        return {**found, "prompt": text}

    monkeypatch.setattr(study, "measure", once)
    with pytest.raises(KeyboardInterrupt):
        study.main(["--quick", "--out", str(out)])
    assert not out.exists() and len(Path(f"{out}.part").read_text().splitlines()) == 1
    study.main(["--quick", "--out", str(out)])
    found = json.loads(out.read_text())
    assert len(counted) == 3 and counted[1] == counted[2] != counted[0]
    assert found["prompts"] == 2 and found["model"] == "demo"
    assert not Path(f"{out}.part").exists() and "shapley, log-prob, signed" in capsys.readouterr().out
    page = report([found])
    assert "## Rules, demo" in page and "| shapley |" in page and "2 prompts" in page


@pytest.mark.parametrize("path", sorted((ROOT / "bench/results").glob("rules-*.json")), ids=lambda path: path.stem)
def test_the_page_holds_the_measured_tables(path):
    found, page = json.loads(path.read_text()), (ROOT / "docs/rules.md").read_text(encoding="utf-8")
    for text in (tables.masking(found, LOWEST), tables.masking(found, HIGHEST), tables.deletion(found)):
        assert text in page


def test_the_ledger_is_verified_before_it_is_timed(monkeypatch, tmp_path, capsys):
    out = tmp_path / "ledger.json"
    speed.main(["--tiny", "--length", "4", "--runs", "1", "--threads", "1", "--no-memory", "--out", str(out)])
    found = json.loads(out.read_text())
    assert {row["provider"] for row in found["rows"]} >= {speed.LEDGER, speed.GRADIENT, speed.EXACT}
    assert "verified" in capsys.readouterr().out and "## Ledger" in report([found])
    monkeypatch.setattr(speed, "TOLERANCE", -1.0)
    with pytest.raises(RuntimeError, match="nothing is timed"):
        speed.main(["--tiny", "--length", "4", "--runs", "1", "--threads", "1", "--no-memory"])
