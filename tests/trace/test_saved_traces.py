"""Traces that are copied, pickled and read again: they are of the same model with the same weights, or refused."""

from __future__ import annotations

import copy
import gc
import io
import pickle

import pytest
import torch

from depass_fast import Adjoint, DePass, Heads, Neurons, Tokens
from depass_fast.demo import load_demo
from depass_fast.trace.fingerprint import Fingerprint
from tests.support.family_models import build_model
from tests.support.models import build, random_ids

IDS = random_ids(7)


def saved(value):
    return pickle.loads(pickle.dumps(value))


def by_torch(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("through", [copy.copy, copy.deepcopy, saved, by_torch, lambda value: saved(saved(value))])
def test_a_saved_trace_gives_the_same(through):
    dp = build("qwen2")
    trace = dp.trace([IDS, IDS[:3]])
    again = through(trace)
    assert again is not trace and repr(again) == repr(trace)
    for components in (Tokens(), Heads(layers="all"), Neurons(1)):
        for one, other in zip(dp.attribute(trace, components), dp.attribute(again, components), strict=True):
            assert torch.equal(one.scores, other.scores)
    one, other = (dp.carry(held, dp.start(held, Tokens())).dense(1) for held in (trace, again))
    assert torch.equal(one, other)


def test_experts_are_saved_too():
    dp = DePass(build_model("mixtral", num_key_value_heads=2).eval())
    trace = dp.trace(IDS)
    expected = dp.attribute(trace, Neurons(1))
    found = dp.attribute(saved(trace), Neurons(1))
    assert torch.equal(found.scores, expected.scores) and found.labels == expected.labels


def test_a_copy_belongs_to_the_same_model():
    other = DePass(build_model("qwen2", num_key_value_heads=2, seed=1).eval())
    trace = copy.deepcopy(build("qwen2").trace(IDS))
    with pytest.raises(ValueError, match="trace: it was made by another model"):
        other.attribute(trace, Tokens())


def test_the_same_model_loaded_again_takes_it():
    """The model that made the trace is gone, like in another process."""
    dp = DePass(*load_demo())
    file = pickle.dumps(dp.trace("Nyria Morstam speaks"))
    expected = dp.attribute("Nyria Morstam speaks", Tokens())
    del dp
    gc.collect()
    trace = pickle.loads(file)
    assert "made by LlamaForCausalLM" in repr(trace)
    assert torch.equal(DePass(*load_demo()).attribute(trace, Tokens()).scores, expected.scores)
    with pytest.raises(ValueError, match="trace: it was made by another model"):
        DePass(*load_demo()).attribute(trace, Tokens())  # it has found its model


@torch.no_grad()
def change(model, what: str) -> str:
    """Change a model, and return the message that a trace of it as it was then gives."""
    layer = model.model.layers[1]
    if what == "a weight":
        layer.mlp.up_proj.weight.data[3, 5] *= 1.001
    elif what == "two rows":
        layer.self_attn.q_proj.weight.data[[0, 1]] = layer.self_attn.q_proj.weight.data[[1, 0]]
    elif what == "a norm":
        layer.input_layernorm.weight.data.neg_()
    elif what == "its config":
        model.config.rms_norm_eps = 0.5
        return r"another model, whose config has rms_norm_eps = 1e-06 where this one has 0\.5; trace the prompt with"
    elif what == "its dtype":
        model.to(torch.bfloat16)
        return "another model, whose weight"
    return "another model, whose weight model.layers.1.[a-z_.]*weight differs from this one's; trace the prompt with"


@pytest.mark.parametrize("what", ["a weight", "two rows", "a norm", "its config", "its dtype"])
def test_a_saved_trace_is_refused_by_any_other_model(what):
    model = build_model("qwen2", num_key_value_heads=2).eval()
    file = pickle.dumps(DePass(model).trace(IDS))
    message = change(model, what)
    with pytest.raises(ValueError, match=message):
        DePass(model).attribute(pickle.loads(file), Tokens())
    with pytest.raises(ValueError, match="another model, a Qwen2ForCausalLM, not a LlamaForCausalLM"):
        build("llama-gqa").attribute(pickle.loads(file), Tokens())


def test_weights_that_change_later_are_noticed_as_ever():
    dp = DePass(build_model("qwen2", num_key_value_heads=2).eval())
    trace = saved(dp.trace(IDS))
    dp.attribute(trace, Tokens())
    with torch.no_grad():
        dp.model.lm_head.weight.mul_(2)
    with pytest.raises(ValueError, match="weights have changed since it was made"):
        dp.attribute(trace, Tokens())
    with pytest.raises(ValueError, match="weights have changed since it was made"):
        pickle.dumps(trace)


def test_a_trace_is_not_saved_without_its_model():
    trace = DePass(build_model("qwen2", num_key_value_heads=2).eval()).trace(IDS)
    gc.collect()
    assert "made by a model that is gone" in repr(trace)
    with pytest.raises(
        ValueError, match="the model that it was made by is gone; save a trace while its model is there"
    ):
        pickle.dumps(trace)


def test_a_fingerprint_is_of_bits():
    model = build_model("llama", num_key_value_heads=2, tie_word_embeddings=True).eval()
    found = Fingerprint.of(model)
    assert found.weights["lm_head.weight"] == found.weights["model.embed_tokens.weight"]
    assert found.difference(Fingerprint.of(copy.deepcopy(model))) is None
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")
    assert found.difference(Fingerprint.of(model)) is None
    assert "config" not in str(found.difference(Fingerprint.of(model.double())))


def test_results_and_states_are_pickled():
    dp = build("qwen2")
    partition = dp.partition(IDS, Neurons(1))
    values = [
        dp.attribute(IDS, Neurons(layers="all"), method=Adjoint(refine=2)),
        dp.attribute_generation(IDS, max_new_tokens=2),
        dp.decompose(IDS, Tokens()),
        dp.plan(7, Tokens()),
        dp.focus(IDS, Neurons(1), [0], partition=partition),
    ]
    for value in values:
        for again in (saved(value), copy.deepcopy(value)):
            assert str(again) == str(value)
    for prompt in (IDS, dp.trace(IDS), saved(dp.trace(IDS))):
        focus = dp.focus(prompt, Neurons(1), [0], partition=saved(partition))
        assert torch.equal(focus.states[-1], values[-1].states[-1])
    with pytest.raises(ValueError, match="partition: it was made by another model"):
        build("llama-gqa").focus(IDS, Neurons(1), [0], partition=saved(partition))
