"""A given continuation, decomposed once: shares in the logit and in the log-probability of each of its tokens."""

import json

import pytest
import torch

from depass_fast import (
    Adjoint,
    Attribution,
    Continuation,
    DePass,
    Generation,
    Heads,
    LayeredAttribution,
    Neurons,
    Tokens,
)
from tests.methods.test_positions import same
from tests.support.components import kinds
from tests.support.family_models import build_model
from tests.support.models import build, random_ids

IDS, GIVEN = random_ids(5), random_ids(4, seed=7)
ALL = IDS + GIVEN


def log_probs_of(dp: DePass, ids: list[int]) -> torch.Tensor:
    """The model's own log-probabilities (N, vocabulary) after every token, in float64."""
    with torch.no_grad():
        return dp.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def frozen_direction(dp: DePass, ids: list[int], position: int, token: int) -> torch.Tensor:
    """The gradient of log P(token) in the normed hidden state at a position, by autograd."""
    hidden = dp.trace(ids).normed_final[position].clone().requires_grad_()
    with torch.enable_grad():
        dp.adapter.logits(hidden).log_softmax(-1)[token].backward()
    return hidden.grad


@pytest.mark.parametrize("kind", kinds(9))
def test_shares_equal_single_calls(kind):
    dp, components = build("qwen2"), kinds(9)[kind]
    found = dp.attribute(IDS, components, continuation=GIVEN)
    assert isinstance(found, Continuation) and len(found) == 4 and found.input_ids == ALL and found.prompt_length == 5
    for k, token in enumerate(GIVEN):
        at = 4 + k
        direction = frozen_direction(dp, ALL, at, token)
        logit = dp.attribute(ALL, components, token, position=at)
        log_prob = dp.attribute(ALL, components, direction, position=at)
        assert same(found.steps[k], logit) and same(found.log_prob_steps[k], log_prob)
        assert found.steps[k].target_ids == [token] and found.steps[k].position == at
        assert found.steps[k].input_ids == ALL[: at + 1]
    assert found.scores.shape == found.log_prob_scores.shape == (4, len(found.labels))
    assert torch.allclose(found.scores.sum(1), found.logits, atol=1e-4) and found.completeness_error < 1e-5


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("gemma2", {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 2.0}),
        ("phi", {"partial_rotary_factor": 0.5}),
        ("granite", {"logits_scaling": 3.0}),
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 16}),
    ],
)
def test_log_probabilities_are_the_models_own(model_type, changes, monkeypatch):
    """With a cap, a bias, a scale or a projection in front of the logits, and a vocabulary in several blocks."""
    monkeypatch.setattr("depass_fast.readout.log_probs._ELEMENTS", 32 * 7)
    dp = DePass(build_model(model_type, **changes).double())
    found = dp.attribute(IDS, Heads(0), continuation=GIVEN)
    own = log_probs_of(dp, ALL)[4:8]
    mine = own[range(4), GIVEN]
    entropies = -(own.exp() * own).sum(1)
    assert torch.allclose(found.log_probs, mine) and torch.allclose(found.entropies, entropies)
    assert torch.allclose(found.log_prob_scores.sum(1), mine + entropies) and found.completeness_error < 1e-10
    for name, factor in (("sum", 1.0), ("mean", 0.25)):
        reduced = getattr(found, name)
        assert torch.allclose(reduced.scores, found.log_prob_scores.sum(0) * factor)
        assert torch.allclose(reduced.target_logits, (mine + entropies).sum() * factor)
        alone = dp.attribute(IDS, Heads(0), continuation=GIVEN, reduce=name)
        assert isinstance(alone, Attribution) and torch.equal(alone.scores, reduced.scores)
        assert name in alone.target_names[0] and str(alone)


@pytest.mark.parametrize("options", [{}, {"backend": "reference"}, {"stream": True}, {"verify": True}])
def test_a_batch_has_a_continuation_for_all_or_one_each(options):
    dp = build("llama-biases")
    each = dp.attribute([IDS, IDS[:2]], Tokens(), continuation=[GIVEN, GIVEN[:1]], **options)
    assert [len(one) for one in each] == [4, 1]
    alone = [dp.attribute(IDS, Tokens(), continuation=GIVEN), dp.attribute(IDS[:2], Tokens(), continuation=GIVEN[:1])]
    for one, other in zip(each, alone, strict=True):
        assert torch.allclose(one.scores, other.scores, atol=1e-4)
        assert torch.allclose(one.log_probs, other.log_probs, atol=1e-5)
        assert (one.verification is not None) == ("verify" in options)
    both = dp.attribute([IDS, IDS], Tokens(), continuation=torch.tensor(GIVEN), reduce="sum")
    assert all(torch.allclose(one.scores, alone[0].sum.scores, atol=1e-4) for one in both)


@pytest.mark.parametrize("method", ["exact", Adjoint(refine=500, sample=8)])
def test_all_layers(method, tmp_path):
    dp, kind = build("qwen2"), Neurons(layers="all")
    found = dp.attribute(IDS, kind, continuation=GIVEN, method=method)
    assert found.scores.shape == (4, 3, 48) and isinstance(found.sum, LayeredAttribution)
    for k, (step, token) in enumerate(zip(found.steps, GIVEN, strict=True)):
        alone = dp.attribute(ALL[: 5 + k], kind, token, method=method)
        assert all(same(one, other) for one, other in zip(step, alone, strict=True))
    assert torch.allclose(found.sum.scores, found.log_prob_scores.sum(0))
    assert (found.sum.estimate is None) == (method == "exact") == (found.steps[0].estimate is None)
    found.save(tmp_path / "all.safetensors")
    assert torch.equal(Continuation.load(tmp_path / "all.safetensors").scores, found.scores)
    names, rows = found._table()
    assert names[2] == "layer" and len(rows) == 4 * sum(len(one.labels) for one in found.shares)


@pytest.mark.parametrize("kind", [Tokens(), Heads(layers="all")])
def test_a_reduced_continuation_says_what_it_is_of(kind, tmp_path):
    found = build("qwen2").attribute(IDS, kind, continuation=GIVEN)
    for by, factor in (("sum", 1.0), ("mean", 0.25)):
        one = getattr(found, by)
        assert [one.reduced[name] for name in ("by", "prompt_length", "tokens")] == [by, 5, 4] and one.position == 7
        log_prob, entropy = (float(each.sum()) * factor for each in (found.log_probs, found.entropies))
        assert abs(one.reduced["log_prob"] - log_prob) < 1e-5 and abs(one.reduced["entropy"] - entropy) < 1e-5
        assert abs(float(one.target_logits) - log_prob - entropy) < 1e-4
        assert f"{by} of log P of 4 tokens, P frozen, at 4 positions (4 to 7): projection" in str(one)
        assert f"(log P {log_prob:.4f}, entropy {entropy:.4f})" in str(one) and one.to_dict()["reduced"] == one.reduced
        one.save(tmp_path / "one.safetensors")
        assert type(one).load(tmp_path / "one.safetensors").reduced == one.reduced
    assert found.steps[0].reduced is None and "reduced" not in found.how()
    assert "at position 4" in str(build("qwen2").attribute(IDS, kind, continuation=[3], reduce="sum"))
    new = " ".join(map(str, GIVEN))
    assert f"4 given: '{new}'" in repr(found)  # no text without a tokenizer: they are told apart


@pytest.mark.filterwarnings("ignore::depass_fast.ApproximationWarning")
@pytest.mark.parametrize("options", [{}, {"verify": True}, {"method": Adjoint(refine=8, sample=8)}])
def test_plain_values_say_how_they_came_about(options):
    kind = Neurons(1) if "method" in options else Tokens()
    found = build("qwen2").attribute(IDS, kind, continuation=GIVEN, **options)
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["provenance"]["model_class"] == found.provenance.model_class == "Qwen2ForCausalLM"
    assert (plain["verification"] is None) == (found.verification is None) == ("verify" not in options)
    assert (plain["estimate"] is None) == (found.estimate is None) == ("method" not in options)
    assert plain["method"] == found.how()["method"] and plain["warnings"] == (found.warnings or [])


def test_a_continuation_is_text_behind_text(demo):
    prompt, text = "When Diane met Grace at the park, Grace handed", " the camera to Diane"
    found = demo.attribute(prompt, Tokens(), continuation=text)
    assert found.text == prompt + text and found.input_ids == demo.tokenizer.encode(prompt + text)
    token = found.steps[-1].position + 1
    alone = demo.attribute(found.input_ids[:token], Tokens(), found.input_ids[token])
    assert alone.labels == found.steps[-1].labels and same(found.steps[-1], alone)
    with pytest.raises(ValueError, match=r"Several tokens are given to attribute\(\.\.\., continuation="):
        demo.attribute(prompt, Tokens(), " the camera")
    with pytest.raises(TypeError, match=r"A text of several tokens is given to attribute\(\.\.\., continuation="):
        demo.attribute(prompt, Tokens(), targets=" the camera")


def test_a_generation_is_a_continuation_that_was_generated(tmp_path):
    dp = build("qwen2")
    found = dp.attribute_generation(IDS, max_new_tokens=3, generation={"eos_token_id": None})
    given = dp.attribute(IDS, Tokens(), continuation=found.input_ids[5:])
    assert isinstance(found, Generation) and isinstance(found, Continuation)
    assert torch.equal(found.scores, given.scores[:, :8]) and torch.equal(found.log_probs, given.log_probs)
    found.save(tmp_path / "generated.safetensors")
    loaded = Attribution.load(tmp_path / "generated.safetensors")
    assert type(loaded) is Generation and torch.equal(loaded.scores, found.scores) and str(loaded) == str(found)


def test_a_continuation_can_be_read_saved_and_tabled(demo, tmp_path):
    rich = pytest.importorskip("rich.console")
    found = demo.attribute("Nyria Morstam speaks", Tokens(), continuation=" Italian and")
    assert len(repr(found)) < 2000 and "log P of all" in str(found) and found.tokens[-1] in str(found)
    with rich.Console(width=100).capture():
        rich.Console(width=100).print(found)
    found.save(tmp_path / "c.safetensors")
    loaded = Continuation.load(tmp_path / "c.safetensors")
    assert torch.equal(loaded.log_prob_scores, found.log_prob_scores) and torch.equal(loaded.log_probs, found.log_probs)
    assert loaded.to_dict() == found.to_dict() and str(loaded) == str(found) and loaded.warnings is None
    found.to_csv(tmp_path / "c.csv")
    lines = (tmp_path / "c.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "position,token,label,score,log_prob_score"
    assert len(lines) == 1 + sum(len(step.labels) for step in found.steps)
    if pytest.importorskip("pandas"):
        assert len(found.to_dataframe()) == len(lines) - 1


def test_logits_of_other_tokens_that_a_hook_changes_are_refused():
    """The given tokens' own logits are as ever, and their probabilities are not."""
    dp = DePass(build_model("llama"))

    def silence(module, inputs, output):
        return output.index_fill(-1, torch.tensor([one for one in range(64) if one not in ALL]), -torch.inf)

    handle = dp.model.lm_head.register_forward_hook(silence)
    try:
        with pytest.raises(ValueError, match="logsumexp of the model's logits .* a forward hook on lm_head"):
            dp.attribute(IDS, Heads(0), continuation=GIVEN)
    finally:
        handle.remove()
    assert len(dp.attribute(IDS, Heads(0), continuation=GIVEN)) == 4


def test_a_plan_is_that_of_both():
    dp = build("llama-gqa")
    plan = dp.plan(IDS, Tokens(), continuation=GIVEN, measure=False)
    assert plan.lengths == (9,) and plan.flop == dp.plan(9, Tokens(), position=[3, 7], measure=False).flop
    with pytest.raises(ValueError, match="continuation: it follows a prompt"):
        dp.plan(5, Tokens(), continuation=GIVEN)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 3}, "target: a continuation is read in front of each of its tokens"),
        ({"targets": [3]}, "targets: a continuation"),
        ({"contrast": 3}, "contrast: a continuation"),
        ({"position": 3}, "position: a continuation"),
        ({"position": [-1]}, "position: a continuation"),
        ({"end": 2}, "end: a continuation"),
        ({"reduce": "max"}, "reduce: 'max' is not one of None, 'sum', 'mean'"),
        ({"continuation": []}, "continuation: empty"),
        ({"continuation": [[]]}, "continuation: empty"),
        ({"continuation": [64]}, r"continuation: id 64 is outside the vocabulary \(0 to 63\)"),
        ({"continuation": [GIVEN, GIVEN]}, r"one per prompt \(1\), got a list of 2"),
        ({"continuation": " text"}, "a tokenizer is needed"),
        ({"continuation": torch.zeros(1, 1, 1).long()}, r"shape \(T,\) or \(P, T\)"),
        ({"continuation": random_ids(60)}, "60 tokens after a prompt of 5 pass the model's context of 64"),
        ({"continuation": [1.5]}, "continuation: expected an integer, got 1.5"),
        ({"continuation": torch.tensor([1.5])}, "continuation: expected integer ids"),
        ({"continuation": 3}, "continuation: expected text, token ids, or a list of these, got 3"),
        ({"continuation": None, "reduce": "sum"}, "reduce: 'sum' is of the tokens of a continuation"),
    ],
)
def test_what_does_not_go_together_is_refused_before_any_work(arguments, message, monkeypatch):
    dp = build("llama-gqa")
    monkeypatch.setattr(dp.model, "forward", lambda *args, **kwargs: pytest.fail("work was done"))
    with pytest.raises((ValueError, TypeError), match=message):
        dp.attribute(IDS, Tokens(), **({"continuation": GIVEN} | arguments))


def test_a_trace_has_no_continuation():
    dp = build("llama-gqa")
    with pytest.raises(TypeError, match="prompt: a trace is of its own tokens only"):
        dp.attribute(dp.trace(IDS), Tokens(), continuation=GIVEN)
