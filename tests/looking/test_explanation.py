"""Explanations against the formulas by hand, the model's own attention, and the properties that they must have."""

import math

import numpy as np
import pytest
import torch

from depass_fast import (
    AttentionExplanation,
    CompletenessWarning,
    Continuation,
    Custom,
    DePass,
    Heads,
    Neurons,
    Pair,
    Tokens,
)
from depass_fast.looking.rows import PromptRows
from tests.looking.test_turns import by_hand
from tests.support.components import kinds
from tests.support.family_models import available, build_variant
from tests.support.models import build, random_ids
from tests.support.trained import smollm2

IDS = random_ids(9)


@torch.no_grad()
def test_it_is_the_formula_of_a_llama():
    dp, layer, query = build("llama-gqa", torch.float64), 1, 6
    states = torch.randn(len(IDS), 4, 32, dtype=torch.float64) * 0.3
    trace, kind = dp.trace(IDS), Custom(1, states)
    why = dp.explain_attention(trace, kind, layer, query=query)
    x, module = trace.layers[layer].resid_pre, dp.model.model.layers[layer]
    scale = torch.rsqrt(x.square().mean(-1) + module.input_layernorm.variance_epsilon)
    parts = torch.cat([states, (x - states.sum(1))[:, None]], 1) * scale[:, None, None] * module.input_layernorm.weight

    def turned(projection, heads):
        made = (parts @ projection.weight.T).unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)  # (M, H, N, d)
        return torch.stack([by_hand(dp.model, one[None])[0] for one in made])

    q, k = turned(module.self_attn.q_proj, 4), turned(module.self_attn.k_proj, 2).repeat_interleave(2, 1)
    c = module.self_attn.head_dim**-0.5
    pairs = c * torch.einsum("mhd,lhnd->hnml", q[:, :, query], k[:, :, : query + 1])
    assert torch.allclose(why.scores, pairs.sum((2, 3)), atol=1e-6)
    assert torch.allclose(why.query_side, pairs.sum(3), atol=1e-6)
    assert torch.allclose(why.key_side, pairs.sum(2), atol=1e-6)
    found = why.pairs(2, k=25, head=3)
    wanted = {(why.labels[m], why.labels[n]): float(pairs[3, 2, m, n]) for m in range(5) for n in range(5)}
    assert all(math.isclose(one.score, wanted[one.query, one.key], abs_tol=1e-6) for one in found)
    assert [abs(one.score) for one in found] == sorted((abs(one.score) for one in found), reverse=True)
    p = pairs.sum((2, 3)).softmax(-1)
    both = (pairs.sum(3) + pairs.sum(2)) / 2
    assert torch.allclose(why.query_mean, (p[..., None] * pairs.sum(3)).sum(1), atol=1e-6)
    assert torch.allclose(why.log_probability(4, 1), both[1, 4] - (p[1, :, None] * both[1]).sum(0), atol=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        "llama: GQA",
        "gemma2: tight caps",
        "gemma3_text",
        "mistral: window",
        "gpt2",
        "phi: QK norms",
        "deepseek_v3",
        "olmo2",
    ],
)
@torch.no_grad()
def test_probabilities_are_the_models_own(name):
    if not available(name):
        pytest.skip("not in this version of transformers")
    dp = DePass(build_variant(name, implementation="eager"))
    own = dp.model(torch.tensor([IDS]), output_attentions=True).attentions
    for layer in range(dp.adapter.n_layers):
        why = dp.explain_attention(IDS, Tokens(), layer, query=7)
        assert torch.allclose(why.probabilities, own[layer][0, :, 7, why.keys], atol=1e-5)
        assert float(own[layer][0, :, 7].sum(-1).min()) > 0.999


@pytest.mark.parametrize("label", kinds(len(IDS)))
def test_every_kind_of_component(label):
    dp, kind = build("qwen2"), kinds(len(IDS))[label]
    first = kind.entry(dp.adapter).layer + (kind.site == "resid_mid")
    for layer in range(first, dp.adapter.n_layers):
        why = dp.explain_attention(IDS, kind, layer)
        assert why.completeness_error <= 1e-5
        assert why.labels[-1] == "bias"  # queries, keys and values have biases
    if first >= dp.adapter.n_layers:
        with pytest.raises(ValueError, match="layer: the attention of layer 2 reads none of these components"):
            dp.explain_attention(IDS, kind, 2)


def test_shares_of_parts_add_up():
    dp, states = build("llama-gqa"), torch.randn(len(IDS), 3, 32)
    apart = dp.explain_attention(IDS, Custom(1, states), 1)
    merged = dp.explain_attention(IDS, Custom(1, torch.stack([states[:, 0] + states[:, 1], states[:, 2]], 1)), 1)
    for side in ("query_side", "key_side"):
        one, other = getattr(apart, side), getattr(merged, side)
        assert torch.allclose(one[..., 0] + one[..., 1], other[..., 0], atol=1e-4)
        assert torch.allclose(one[..., 2:], other[..., 1:], atol=1e-4)


def test_one_head_one_key_and_two_keys():
    dp, trace = build("llama-gqa"), build("llama-gqa").trace(IDS)
    every = dp.explain_attention(trace, Heads(0), 2, query=-2)
    assert every.scores.shape == (4, 8) and every.query == 7 and every.keys == list(range(8))
    one = dp.explain_attention(trace, Heads(0), 2, 3, query=-2)
    assert one.scores.shape == (8,) and one.query_side.shape == (8, len(one.labels))
    some = dp.explain_attention(trace, Heads(0), 2, [3, 1], query=-2)
    assert some.heads == [3, 1] and torch.allclose(some.query_side[0], one.query_side, atol=1e-6)
    key = dp.explain_attention(trace, Heads(0), 2, -1, query=-2, key=4)
    pair = dp.explain_attention(trace, Heads(0), 2, 3, query=-2, key=(4, 6))
    for name in ("query_side", "key_side", "scores", "probabilities"):
        whole = getattr(one, name)
        assert torch.allclose(getattr(key, name), whole[[4]], atol=1e-6)
        assert torch.allclose(getattr(pair, name), whole[[4, 6]], atol=1e-6)
    assert torch.allclose(key.log_probability(4), one.log_probability(4), atol=1e-5)
    assert torch.allclose(pair.difference(), one.difference(4, 6), atol=1e-6)
    assert one.top(2, key=4, side="key") == key.top(2, side="key")
    assert all(isinstance(found, Pair) for found in pair.pairs(6, 3))
    for given in (torch.tensor([3, 1]), np.array([3, 1]), (3, 1)):
        found = dp.explain_attention(trace, Heads(0), 2, given, query=-2)
        assert found.heads == [3, 1] and torch.equal(found.key_side, some.key_side)
    assert dp.explain_attention(trace, Heads(0), "blocks.2.attn.hook_pattern", torch.tensor(3)).scores.shape == (9,)
    assert torch.equal(dp.explain_attention(trace, Heads(0), 2, 3, query=-2, key=np.array([4, 6])).scores, pair.scores)


def test_prompts_together_are_those_alone():
    dp, prompts = build("llama-gqa"), [random_ids(4), IDS, [3]]
    together = dp.explain_attention(prompts, Tokens(), 2)
    for ids, found in zip(prompts, together, strict=True):
        alone = dp.explain_attention(ids, Tokens(), 2)
        assert found.labels == alone.labels and torch.allclose(found.key_side, alone.key_side, atol=1e-5)
    assert dp.explain_attention([[3]], Tokens(), 0)[0].probabilities.tolist() == [[1.0]] * 4


def test_positions_behind_the_query_do_not_matter():
    dp = build("llama-gqa")
    cut, whole = dp.explain_attention(IDS[:5], Tokens(), 2), dp.explain_attention(IDS, Tokens(), 2, query=4)
    assert cut.labels == whole.labels and torch.allclose(cut.key_side, whole.key_side, atol=1e-5)


def test_it_may_be_verified(tmp_path):
    dp = build("llama-gqa")
    for made in (
        dp.explain_attention(IDS, Heads(0), 2, verify=True),
        dp.attention_credit(IDS, Heads(0), 3, allocation="softmax", verify=True),
    ):
        assert made.verification.passed and made.verification.compared > 0 and made.warnings is None
        made.save(tmp_path / "made.safetensors")
        assert type(made).load(tmp_path / "made.safetensors").verification == made.verification
    assert dp.explain_attention(IDS, Heads(0), 2).verification is None


@pytest.mark.parametrize("options", [{"backend": "reference"}, {"stream": True}, {"allocation": "shapley"}], ids=str)
def test_ways_to_carry_the_components(options):
    dp = build("llama-gqa")
    why = dp.explain_attention(IDS, Heads(0), 2, **options)
    assert why.completeness_error <= 1e-5
    if "allocation" not in options:
        assert torch.allclose(why.key_side, dp.explain_attention(IDS, Heads(0), 2).key_side, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    dp = DePass(build_variant("llama: GQA").to(dtype))
    why = dp.explain_attention(IDS, Tokens(), 2)
    assert why.completeness_error < 0.02 and why.scores.dtype == torch.float32 and why.warnings is None


def test_nothing_warns_where_nothing_is_wrong(recwarn):
    dp = DePass(build_variant("ernie4_5").double()) if available("ernie4_5") else build("llama-gqa", torch.float64)
    why = dp.explain_attention(IDS, Tokens(), 1)  # the model's own rotary embedding is in float32
    assert why.warnings is None and not [one for one in recwarn if "completeness" in str(one.message)]


def test_a_rule_that_loses_shares_warns():
    dp = build("llama-gqa")
    with pytest.warns(UserWarning, match="the components miss"):
        why = dp.explain_attention(IDS, Tokens(), 2, allocation=lambda gates, _: torch.zeros_like(gates.values))
    assert why.warnings


def test_files_and_tables(tmp_path):
    dp = build("llama-gqa")
    for why in (dp.explain_attention(IDS, Tokens(), 1), dp.explain_attention(IDS, Tokens(), 1, 2, key=3)):
        why.save(tmp_path / "why.safetensors")
        read = AttentionExplanation.load(tmp_path / "why.safetensors")
        assert torch.equal(read.query_side, why.query_side) and read.labels == why.labels
        assert read.provenance == why.provenance and str(read) == str(why)
        with pytest.raises(ValueError, match=r"pairs: .*was not kept; ask explain_attention\(\.\.\., key="):
            read.pairs(3, head=2)
        with pytest.raises(ValueError, match="without: what the keys hold was not kept; ask explain_attention for all"):
            read.without(head=2)
        frame = why.to_dataframe()
        assert len(frame) == len(why.heads) * len(why.keys) * len(why.labels)
        why.to_csv(tmp_path / "why.csv")
        assert len((tmp_path / "why.csv").read_text().splitlines()) == len(frame) + 1
        assert np.allclose(why.to_dict()["scores"], why.scores)
    with pytest.raises(ValueError, match=r"AttentionExplanation.load\(path\)"):
        Continuation.load(tmp_path / "why.safetensors")


def test_a_saved_explanation_of_sinks(tmp_path):
    if not available("gpt_oss"):
        pytest.skip("not in this version of transformers")
    why = DePass(build_variant("gpt_oss")).explain_attention(IDS, Tokens(), 1)
    why.save(tmp_path / "why.safetensors")
    assert torch.equal(AttentionExplanation.load(tmp_path / "why.safetensors").sink, why.sink)


@pytest.mark.parametrize("sink", [-50.0, -12.0, 0.0, 30.0])
def test_sinks_far_from_the_logits(sink):
    """A sink that hardly anything goes to, or nearly all, is still the constant that the model has."""
    if not available("gpt_oss"):
        pytest.skip("not in this version of transformers")
    found = {}
    for dtype in (torch.float32, torch.float64):
        dp = DePass(build_variant("gpt_oss").to(dtype))
        with torch.no_grad():
            for layer in dp.model.model.layers:
                layer.self_attn.sinks.fill_(sink)
        credit, why = dp.attention_credit(IDS, Tokens(), 5), dp.explain_attention(IDS, Tokens(), 1)
        assert credit.completeness_error <= 1e-5 and torch.isfinite(credit.scores).all()
        log_p = (why.probabilities[:, 3].log() + why.entropy).tolist()
        sums = [float(why.log_probability(3, head).sum()) for head in why.heads]
        assert np.allclose(sums, log_p, atol=1e-4 * (1 + abs(sink)))
        found[dtype] = credit
    single, double = found.values()
    assert torch.allclose(single.changes.double(), double.changes, atol=1e-3)
    assert torch.allclose(single.total().double(), double.total(), atol=2e-3)


def test_what_it_looks_like():
    dp = build("llama-gqa")
    text = str(dp.explain_attention(IDS, Tokens(), 1, 2))
    assert "layer 1, head 2: why" in text and "others" in text and "completeness error" in text
    assert str(dp.explain_attention(IDS, Tokens(), 1)).count("head ") == 4
    console = pytest.importorskip("rich.console").Console(record=True, width=120)
    console.print(dp.explain_attention(IDS, Tokens(), 1, 2))
    assert "others" in console.export_text()
    assert "heads [0, 1, 2, 3]" in repr(dp.explain_attention(IDS, Tokens(), 1))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"layer": 3}, ValueError, "layer: 3 is out of range; this model has 3 layers"),
        ({"layer": "blocks.1.hook_z"}, ValueError, "layer: .*does not fit here"),
        ({"layer": 1.5}, TypeError, "layer: expected an integer"),
        ({"layer": 1, "head": 4}, ValueError, "head: 4 is out of range; layer 1 has 4 heads"),
        ({"layer": 1, "head": []}, ValueError, "head: the list is empty"),
        ({"layer": 1, "head": [1, -3]}, ValueError, "head: a head is there twice"),
        ({"layer": 1, "head": "a"}, TypeError, "head: expected an integer"),
        ({"layer": 1, "query": 9}, ValueError, "query: 9 is out of range for a prompt of 9 tokens"),
        ({"layer": 1, "query": [1]}, TypeError, "query: expected an integer"),
        ({"layer": 1, "key": 12}, ValueError, "key: 12 is out of range"),
        ({"layer": 1, "query": 3, "key": 5}, ValueError, "key: 5 is behind the query at position 3"),
        ({"layer": 1, "key": (1, 1)}, ValueError, "key: 1 and 1 are the same position"),
        ({"layer": 1, "key": (1, 2, 3)}, ValueError, "key: expected a position, two of them"),
        (
            {"layer": 0, "components": Heads(1)},
            ValueError,
            "layer: the attention of layer 0 reads none of these .* 2 on",
        ),
        ({"layer": 2, "components": Neurons(layers="all")}, ValueError, "layers: one layer's components at a time"),
        ({"layer": "all"}, ValueError, "layer: one layer at a time"),
        ({"layer": 2, "components": "tokens"}, TypeError, "components: expected Tokens"),
    ],
    ids=str,
)
def test_bad_input(arguments, error, message, monkeypatch):
    dp = build("llama-gqa")
    monkeypatch.setattr("depass_fast.request.capture", lambda *_: pytest.fail("the model was run"))
    with pytest.raises(error, match=message):
        dp.explain_attention(IDS, **{"components": Tokens(), **arguments})


def test_a_key_that_a_window_hides():
    dp = build("mistral-window")
    assert dp.explain_attention(IDS, Tokens(), 1).keys == [6, 7, 8]
    with pytest.raises(
        ValueError, match="key: 2 is hidden by the window of layer 1; the query at position 8 sees 6 to 8"
    ):
        dp.explain_attention(IDS, Tokens(), 1, key=2)


@pytest.mark.parametrize(
    "ask, message",
    [
        (lambda why: why.log_probability(7, 1), "key: 7 is not one of the keys"),
        (lambda why: why.log_probability(4), r"head: this explanation holds 4 heads; choose one of \[0, 1, 2, 3\]"),
        (lambda why: why.top(head=7), "head: 7 was not asked for"),
        (lambda why: why.top(side="left", head=1), "side: 'left' is not one of"),
        (lambda why: why.difference(head=1), "difference: give two keys"),
        (lambda why: why.difference(4, head=1), "difference: give both keys"),
        (lambda why: why.pairs(4, 0, 1), "k: 0 is out of range"),
        (lambda why: why.without(head=1), "without: what the keys hold was not kept; ask explain_attention for all"),
        (lambda why: why.without("left", head=1), "side: 'left' is not one of"),
        (lambda why: why.without(norms="gone", head=1), "norms: 'gone' is neither"),
    ],
    ids=range(10),
)
def test_bad_questions(ask, message):
    with pytest.raises(ValueError, match=message):
        ask(build("llama-gqa").explain_attention(IDS, Tokens(), 1, key=4))


def test_an_error_shows(monkeypatch):
    """Components that are not those of the residual stream miss the logits, and the result says by how much."""
    dp = build("llama-gqa")
    at = PromptRows.at
    monkeypatch.setattr(PromptRows, "at", lambda self, *given: (1.1 * at(self, *given)[0], at(self, *given)[1]))
    with pytest.warns(CompletenessWarning, match="the components miss the attention logits"):
        why = dp.explain_attention(IDS, Heads(0), 2)
    assert why.completeness_error > 1e-3 > max(why.layer_errors)


def test_pieces_change_nothing(monkeypatch):
    dp = build("llama-gqa")
    whole = dp.explain_attention(IDS, Tokens(), 2)
    monkeypatch.setattr("depass_fast.looking.explain._HELD", 4 * 32 * 2)
    monkeypatch.setattr("depass_fast.results.explanation._PAIRS", 20)
    pieces = dp.explain_attention(IDS, Tokens(), 2)
    assert torch.allclose(pieces.key_side, whole.key_side, atol=1e-6)
    assert torch.allclose(pieces.key_mean, whole.key_mean, atol=1e-6)
    for one, other in zip(pieces.pairs(4, 5, 1), whole.pairs(4, 5, 1), strict=True):
        assert one[:2] == other[:2] and math.isclose(one.score, other.score, abs_tol=1e-6)


def test_too_much_is_refused(monkeypatch):
    dp = build("llama-gqa")
    monkeypatch.setattr("depass_fast.methods.explain.available", lambda device: 1000)
    with pytest.raises(MemoryError, match="explain_attention: the shares of 4 heads, 9 keys and 9 components need"):
        dp.explain_attention(IDS, Tokens(), 1)


def test_pairs_of_many_keys_need_their_own_call(monkeypatch):
    dp = build("llama-gqa")
    monkeypatch.setattr("depass_fast.methods.explain.KEPT", 6000)
    with pytest.raises(ValueError, match="was not kept"):
        dp.explain_attention(IDS, Tokens(), 1, 0).pairs(3)
    assert len(dp.explain_attention(IDS, Tokens(), 1, 0, key=3).pairs(3)) == 10
    with pytest.raises(ValueError, match="was not kept"):  # of two prompts together it would be twice as much
        dp.explain_attention([IDS, IDS], Tokens(), 1, 0, key=3)[0].pairs(3)


def test_a_trained_model():
    model, tokenizer = smollm2()
    dp, prompt = DePass(model, tokenizer), "When Mary and John went to the store, John gave a drink to"
    for kind in (Tokens(), Heads(9), Neurons(3)):
        why = dp.explain_attention(prompt, kind, 20)
        assert why.completeness_error <= 1e-5 and why.warnings is None
    assert dp.attention_credit(prompt, Tokens(), (" Mary", " John")).completeness_error <= 1e-5
    assert dp.ledger(prompt, (" Mary", " John"), attention=True).steered.completeness_error <= 1e-5
