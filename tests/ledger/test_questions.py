"""A ledger's answers: the forms that `attribute` gives them, its arithmetic, and `attribute` under a linear rule."""

import pytest
import torch

from depass_fast import Contrast, Custom, Features, Heads, LayeredAttribution, LogProb, Modules, Neurons, Tokens
from tests.support.components import Dictionary, kinds
from tests.support.ledgers import RULES, distance, flat
from tests.support.models import build, random_ids

IDS, OTHER = random_ids(7), random_ids(4, seed=1)
VECTOR = torch.linspace(-1, 1, 32, dtype=torch.float64)


def exact(dp, prompt, kind, rule="shapley", **reads):
    return dp.attribute(prompt, kind, allocation=rule, method="exact", **reads)


def assert_close(found, other):
    ours, theirs = flat(found), flat(other)
    assert len(ours) == len(theirs) and max(map(distance, ours, theirs)) <= 1e-12


@pytest.mark.parametrize("name", ["llama-gqa", "llama-biases"])
@pytest.mark.parametrize("kind", ["tokens@1", "heads@0", "modules@1", "neurons@last", "features@1", "custom-mid@0"])
def test_attribute_takes_the_way_back_unless_exact_is_asked_for(name, kind):
    dp, kind = build(name, torch.float64), kinds(len(IDS))[kind]
    trace = dp.trace(IDS)
    given = {"target": 5, "allocation": "half"}
    carried = dp.attribute(trace, kind, method="exact", **given)
    for method in (None, "adjoint"):
        found = dp.attribute(trace, kind, method=method, **given)
        assert distance(found, carried) <= 1e-12 and found.labels == carried.labels
        assert (found.method, found.estimate, found.sweep, found.warnings) == ("adjoint", None, None, None)
        assert found.allocation == "half" and 0 <= found.completeness_error <= 1e-12 and len(found.layer_errors) == 0
        assert found.target_logits == carried.target_logits and found.scores.shape == carried.scores.shape
        assert found.site == carried.site and found.provenance == carried.provenance
    asked = dp.ledger(trace, 5, rule="half").scores(kind)
    assert torch.equal(asked.scores, found.scores) and asked.how() == found.how()


def test_a_ledger_answers_as_attribute_does():
    dp = build("llama-gqa", torch.float64)
    assert dp.ledger(IDS).tokens().scores.ndim == 1
    assert [one.position for one in dp.ledger(IDS, position=[-1, 2, 2]).tokens()] == [6, 2, 2]
    assert [one.position for one in dp.ledger(IDS, position=[3]).heads(1)] == [3]
    found = dp.ledger([IDS, OTHER], [1, LogProb()], position=[-1, 0]).neurons(layers=[0, 2])
    assert [[one.position for one in of_prompt] for of_prompt in found] == [[6, 0], [3, 0]]
    assert all(
        isinstance(one, LayeredAttribution) and one.scores.shape == (2, 2, 48)
        for of_prompt in found
        for one in of_prompt
    )
    (only,) = dp.ledger([IDS]).modules()
    assert only.layers == [0, 1, 2] and only.labels[:3] == ["L0.attn", "L0.mlp", "L1.attn"]
    trace = dp.trace([IDS, OTHER])
    assert [one.input_ids for one in dp.ledger(trace).tokens()] == [IDS, OTHER]


def test_every_question_has_its_call():
    dp, ledger = build("llama-gqa", torch.float64), build("llama-gqa", torch.float64).ledger(IDS, 5)
    states, bases = torch.ones(7, 2, 32), [torch.eye(32)[:, :2]]
    sae = Dictionary(size=8)
    for found, kind in (
        (ledger.tokens(layer=2), Tokens(2)),
        (ledger.heads(-1), Heads(2)),
        (ledger.neurons("blocks.1.mlp.hook_post"), Neurons(1)),
        (ledger.modules(0, "mlp"), Modules(0, which="mlp")),
        (ledger.modules(layers=[2], which="attention"), Modules(layers=[2], which="attention")),
        (ledger.features(sae, 1, "resid_pre"), Features(1, sae, "resid_pre")),
        (ledger.features(Dictionary(size=8, hook="blocks.1.hook_resid_mid")), Features(1, sae, "resid_mid")),
        (ledger.features(sae, site="resid_pre", layers=[0, 1]), Features(layers=[0, 1], sae=sae, site="resid_pre")),
        (ledger.custom(1, states, ["a", "b"], "resid_mid"), Custom(1, states, ["a", "b"], "resid_mid")),
    ):
        assert_close(found, exact(dp, IDS, kind, target=5))
    assert ledger.subspaces(1, bases, ["probe"]).labels == ["probe", "rest"]
    assert ledger.subspaces(layers=[0, 1], bases=bases).layers == [0, 1]
    assert (ledger.heads().layers, ledger.neurons().layers) == ([0, 1, 2], [0, 1, 2])


def test_prompts_have_targets_of_their_own():
    """The rows of a prompt with fewer targets stay empty."""
    dp = build("qwen2", torch.float64)
    targets = [[1, LogProb(2), VECTOR], [3], Contrast(4, 5)]
    prompts = [IDS, OTHER, IDS[:5]]
    ledger = dp.ledger(prompts, targets=targets, position=[1, -1], rule="half")
    assert [len(names) for names in ledger.target_names] == [3, 3, 1, 1, 1, 1]
    for kind in (Tokens(), Heads(1), Modules(0), Neurons(layers="all")):
        answers = ledger.scores(kind)
        for prompt, target, answer in zip(prompts, targets, answers, strict=True):
            assert_close(answer, exact(dp, prompt, kind, "half", target=target, position=[1, -1]))
    assert answers[1][0].by_layer[0].scores.ndim == 2 and answers[2][0].by_layer[0].scores.ndim == 1


@pytest.mark.parametrize("rule", RULES)
def test_excluding_special_tokens_changes_nothing(rule):
    dp = build("llama-gqa", torch.float64)
    usual = dp.ledger(IDS, 5, rule=rule).tokens()
    for excluded in (True, False, [1, 3]):
        found = dp.ledger(IDS, 5, rule=rule, exclude_special=excluded).tokens()
        carried = dp.attribute(IDS, Tokens(), 5, allocation=rule, method="exact", exclude_special=excluded)
        assert torch.equal(found.scores, usual.scores) and distance(found, carried) <= 1e-12
        assert found.exclude_special == [] and "special" not in str(found)


@pytest.mark.parametrize("rule", RULES)
def test_scores_are_linear_in_the_components(rule):
    """The score of a sum is the sum of the scores, zero has none, and what is behind the read position has none."""
    dp, generator = build("llama-biases", torch.float64), torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 7, 32, generator=generator, dtype=torch.float64)
    ledger = dp.ledger(IDS, LogProb(5), rule=rule)
    for site in ("resid_pre", "resid_mid", "resid_post"):
        states = torch.stack([a, b, 2 * a - b, torch.zeros_like(a)], 1)
        of_a, of_b, of_both, of_zero = ledger.custom(1, states, site=site).scores[:4]
        assert torch.allclose(of_both, 2 * of_a - of_b, rtol=1e-12, atol=1e-12) and of_zero == 0.0
    early = dp.ledger(IDS, 5, rule=rule, position=2)
    assert early.tokens(1).labels[:7] == ledger.tokens(1).labels[:7]
    assert (early.tokens(1).scores[3:7] == 0).all()


@pytest.mark.parametrize("name", ["llama-biases", "qwen2"])
@pytest.mark.parametrize("rule", RULES)
def test_every_answer_sums_to_the_target(name, rule):
    dp = build(name, torch.float64)
    ledger = dp.ledger([IDS, OTHER], [5, LogProb(3)], rule=rule)
    for kind in (Tokens(2), Heads(layers="all"), Neurons(layers="all"), Modules(layers="all")):
        for one in flat(ledger.scores(kind)):
            size = one.scores.abs().sum(-1)
            assert ((one.scores.sum(-1) - one.target_logits).abs() <= 1e-12 * size).all()
    assert ledger.completeness_error <= 1e-12


def test_a_module_is_the_sum_of_its_heads_or_neurons():
    """Attention by itself starts where its heads do; beside an MLP, as one of both, behind it."""
    ledger = build("llama-gqa", torch.float64).ledger([IDS, OTHER], 5)
    for which, parts in (("attention", ledger.heads()), ("mlp", ledger.neurons())):
        for whole, each in zip(ledger.modules(which=which), parts, strict=True):
            assert torch.allclose(whole.scores[:, 0], each.scores.sum(-1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [Tokens(), Heads(1), Neurons(layers=[0, 2])], ids=lambda kind: kind.kind)
def test_a_continuation_under_a_linear_rule(kind):
    dp = build("llama-biases", torch.float64)
    found = dp.attribute(IDS, kind, continuation=[3, 9, 4], allocation="half", method="adjoint")
    chosen = dp.attribute(IDS, kind, continuation=[3, 9, 4], allocation="half")
    carried = dp.attribute(IDS, kind, continuation=[3, 9, 4], allocation="half", method="exact")
    for ours, theirs in ((found.steps, carried.steps), (found.log_prob_steps, carried.log_prob_steps)):
        assert_close(ours, theirs)
        assert all(one.method == "adjoint" for one in flat(ours))
    assert_close(found.sum, carried.sum)
    assert_close(chosen.steps, carried.steps)
    assert found.estimate is None and found.warnings in (None, []) and found.completeness_error <= 1e-12


def test_a_generation_under_a_linear_rule():
    dp = build("qwen3", torch.float64)
    found = dp.attribute_generation(IDS, max_new_tokens=3, allocation="shapley")
    assert len(found.steps) == 3
    for number, step in enumerate(found.steps):
        ids = found.input_ids[: len(IDS) + number]
        alone = exact(dp, ids, Tokens(), target=step.target_ids[0])
        assert torch.allclose(step.scores[: len(ids)], alone.scores[: len(ids)], rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["tokens@0", "heads@0", "neurons@0", "modules@1", "custom-mid@0"])
def test_the_input_of_a_layer_is_read(kind):
    dp, kind = build("llama-biases", torch.float64), kinds(len(IDS))[kind]
    reads = {"target": [VECTOR, 2 * VECTOR], "end": 2, "position": [-1, 2]}
    found = dp.attribute(IDS, kind, allocation="half", method="adjoint", **reads)
    assert_close(found, exact(dp, IDS, kind, "half", **reads))
    assert {(one.method, one.end) for one in found} == {("adjoint", 2)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model(dtype):
    """No warning: what is missing is what the model's own rounding explains."""
    dp = build("llama-gqa", dtype)
    ledger = dp.ledger(IDS, LogProb(5))
    assert ledger.tokens().warnings is None and ledger.tokens().scores.dtype == torch.float32
    for kind in (Tokens(), Heads(0), Neurons(1)):
        assert distance(ledger.scores(kind), exact(dp, IDS, kind, target=LogProb(5), compute_dtype="float32")) < 1e-2
