"""Credit of attention against sums by hand, and the second book of a ledger."""

import math

import pytest
import torch

from depass_fast import AttentionCredit, DePass, Heads, LogProb, Neurons, Tokens
from depass_fast.ledger.looking import worst_miss
from depass_fast.looking.path import path_average
from tests.looking.test_every_family import same_totals
from tests.support.components import kinds
from tests.support.family_models import available, build_variant
from tests.support.models import build, random_ids

IDS = random_ids(7)


def by_hand(dp, layer, target):
    """Return what every head of a layer adds to a logit through its own output, by query and key: (H, N, N) times P."""
    ledger = dp.ledger(IDS, target, rule="shapley")
    trace, module = dp.trace(IDS), dp.model.model.layers[layer]
    at = next(site for site in ledger._pages.gradients if (site.layer, site.site) == (layer, "resid_mid"))
    gradients = ledger._pages.gradients[at][0]  # of what attention adds
    x = module.input_layernorm(trace.layers[layer].resid_pre)
    values = module.self_attn.v_proj(x).unflatten(-1, (2, -1)).repeat_interleave(2, 1)  # (N, H, d)
    of_heads = (gradients @ module.self_attn.o_proj.weight).unflatten(-1, (4, -1))
    return torch.einsum("qhd,khd->hqk", of_heads, values)


def test_changes_and_credit_of_a_llama():
    dp, target = build("llama-gqa", torch.float64), 5
    credit = dp.attention_credit(IDS, Tokens(), target, rule="shapley")
    for layer in range(dp.adapter.n_layers):
        worth = by_hand(dp, layer, target)
        scores, changes = torch.zeros(4, len(credit.labels), dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
        for query in range(len(IDS)):
            why = dp.explain_attention(IDS, Tokens(), layer, query=query, allocation="shapley")
            here = worth[:, query, : query + 1]
            average, change = path_average(why.scores, here[None])
            changes += change[0]
            assert torch.allclose(change[0], (why.probabilities * here).sum(-1) - here.mean(-1), atol=1e-12)
            scores[:, : query + 1] += torch.einsum("hk,hkm->hm", average[0], why.shares)
        assert torch.allclose(credit.changes[layer], changes, atol=1e-5)  # norms of the model are in float32
        assert torch.allclose(credit.scores[layer], scores, atol=1e-5)


@pytest.mark.parametrize("label", kinds(len(IDS)))
@pytest.mark.parametrize("rule", ["shapley", "half", "taylor"])
def test_both_ways_agree(label, rule):
    dp, kind = build("qwen2"), kinds(len(IDS))[label]
    entry = kind.entry(dp.adapter)
    if entry.layer + (entry.site == "resid_mid") >= dp.adapter.n_layers:
        with pytest.raises(ValueError, match="components: they start behind the last attention"):
            dp.attention_credit(IDS, kind, 3)
        return
    credit = dp.attention_credit(IDS, kind, 3, rule=rule)
    assert credit.completeness_error <= 1e-5 and credit.rule == rule
    same_totals(credit, dp.ledger(IDS, 3, rule=rule, attention=True).steered.scores(kind), 1e-5)


def test_several_targets_prompts_and_a_position():
    dp, prompts = build("llama-gqa"), [IDS, random_ids(4, seed=3)]
    several = dp.attention_credit(prompts, Tokens(), [3, LogProb(9)], position=2)
    assert several[0].scores.shape == (2, 3, 4, 3) and several[0].target_names[0] == "id 3"
    for ids, found in zip(prompts, several, strict=True):
        for number, target in enumerate((3, LogProb(9))):
            one = dp.attention_credit(ids, Tokens(), target, position=2)
            assert torch.allclose(found.scores[number], one.scores, atol=1e-5)
            assert torch.allclose(found.total(number), one.total(), atol=1e-5)
            assert found.top(2, number)[0][0] == one.top(2)[0][0]
    head = several[0].of_head(1, 2)
    assert torch.equal(head, several[0].scores[0, 1, 2])
    assert several[0].top_heads(1)[0][0].startswith("L")


def test_components_may_come_by_another_rule():
    dp = build("llama-gqa")
    soft = dp.attention_credit(IDS, Tokens(), 3, allocation="softmax")
    linear = dp.attention_credit(IDS, Tokens(), 3)
    assert torch.allclose(soft.changes, linear.changes, atol=1e-5) and soft.allocation == "softmax"
    assert soft.rule == linear.rule == "shapley" and soft.completeness_error <= 1e-5
    assert torch.allclose(soft.scores[0], linear.scores[0], atol=1e-5)
    assert not torch.allclose(soft.scores[2], linear.scores[2], atol=1e-3)


def test_prompts_are_streamed_alike():
    dp = build("llama-gqa")
    usual, other = dp.attention_credit(IDS, Heads(0), 3), dp.attention_credit(IDS, Heads(0), 3, stream=True)
    assert torch.allclose(usual.scores, other.scores, atol=1e-5)


def test_files_and_what_it_looks_like(tmp_path):
    dp = build("llama-gqa")
    credit = dp.attention_credit(IDS, Tokens(), 3)
    credit.save(tmp_path / "credit.safetensors")
    read = AttentionCredit.load(tmp_path / "credit.safetensors")
    assert torch.equal(read.scores, credit.scores) and read.layers == credit.layers and str(read) == str(credit)
    assert "by looking where they look" in str(credit) and "leading:" in repr(credit)
    assert len(credit.to_dataframe()) == credit.scores.numel()
    credit.to_csv(tmp_path / "credit.csv")
    assert credit.to_dict()["rule"] == "shapley"


def test_the_second_book_of_a_ledger(tmp_path):
    dp = build("llama-gqa")
    ledger = dp.ledger([IDS, IDS[:3]], [3, 5], attention=True)
    plain = dp.ledger([IDS, IDS[:3]], [3, 5])
    for kind in (Tokens(), Heads(layers="all"), Neurons(layers="all")):
        for one, other in zip(ledger.scores(kind), plain.scores(kind), strict=True):
            assert torch.allclose(one.scores, other.scores, atol=1e-5)
    steered = ledger.steered
    assert steered.steered is steered and "credit of attention" in str(steered)
    assert str(steered) == str(ledger.steered)  # also how long it took
    assert steered.tokens()[0].target_kinds == ["attention", "attention"]
    assert "credit of attention" in str(steered.tokens()[0])
    assert steered.top(3) and ledger.nbytes > plain.nbytes
    ledger.save(tmp_path / "book.safetensors")
    read = dp.load_ledger(tmp_path / "book.safetensors")
    assert torch.allclose(read.steered.neurons()[0].scores, steered.neurons()[0].scores)
    assert read.steered.completeness_error <= 1e-5
    with pytest.raises(ValueError, match="save: this is the second book"):
        steered.save(tmp_path / "second.safetensors")
    with pytest.raises(ValueError, match=r"steered: this ledger has no book of attention"):
        _ = plain.steered


@pytest.mark.parametrize("name", ["gpt_oss", "mpt", "qwen3"])
def test_pieces_change_nothing(name, monkeypatch):
    if not available(name):
        pytest.skip("not in this version of transformers")
    dp = DePass(build_variant(name))
    whole = dp.attention_credit(IDS, Heads(0), 3)
    monkeypatch.setattr("depass_fast.looking.steer._CPU_TILE", 3 * len(IDS))  # three logits' rows of one head
    monkeypatch.setattr("depass_fast.methods.credit._HELD", 1)
    pieces = dp.attention_credit(IDS, Heads(0), 3)
    for name in ("scores", "changes"):
        assert torch.allclose(getattr(pieces, name), getattr(whole, name), atol=1e-5)


def test_a_ledgers_second_error_is_the_worst_of_its_sites():
    dp = build("llama-gqa")
    pages = dp.ledger(IDS, 3, attention=True).steered._pages
    assert worst_miss(pages) <= 1e-5
    site = next(iter(pages.changes))
    kept = pages.totals[site]
    pages.totals[site] = kept + pages.sizes[site].clamp_min(1.0)
    assert worst_miss(pages) > 0.5
    pages.totals[site] = kept * float("nan")
    assert math.isnan(worst_miss(pages))
    pages.totals[site] = kept


def test_even_attention_owes_nothing():
    """With queries of zero every key is looked at alike, and nothing is owed to looking."""
    dp = DePass(build_variant("llama: GQA"))
    for layer in dp.model.model.layers:
        torch.nn.init.zeros_(layer.self_attn.q_proj.weight)
    credit = dp.attention_credit(IDS, Tokens(), 3)
    assert credit.changes.abs().max() < 1e-6 and credit.scores.abs().max() < 1e-6


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"rule": "softmax"}, ValueError, "rule: 'softmax' is not one of the linear rules"),
        ({"position": [1, 2]}, ValueError, "position: attention_credit reads one position"),
        ({"target": 99}, ValueError, "target"),
        ({"components": Neurons(layers="all")}, ValueError, "layers: one layer's components at a time"),
    ],
    ids=str,
)
def test_bad_input(arguments, error, message, monkeypatch):
    dp = build("llama-gqa")
    monkeypatch.setattr("depass_fast.request.capture", lambda *_: pytest.fail("the model was run"))
    with pytest.raises(error, match=message):
        dp.attention_credit(IDS, **{"components": Tokens(), "target": 3, **arguments})


@pytest.mark.parametrize(
    "ask, error, message",
    [
        (lambda credit: credit.of_head(7, 0), ValueError, "layer: 7 is not among"),
        (lambda credit: credit.of_head(1, 4), ValueError, "head: 4 is out of range"),
        (lambda credit: credit.total(2), IndexError, "target: 2 is out of range"),
    ],
    ids=range(3),
)
def test_bad_questions(ask, error, message):
    with pytest.raises(error, match=message):
        ask(build("llama-gqa").attention_credit(IDS, Tokens(), 3))


def test_too_much_is_refused(monkeypatch):
    dp = build("llama-gqa")
    monkeypatch.setattr("depass_fast.methods.credit.available", lambda device: 1000)
    with pytest.raises(MemoryError, match="attention_credit: queries, keys, values and gradients of 3 layers need"):
        dp.attention_credit(IDS, Tokens(), 3)
