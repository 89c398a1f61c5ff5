"""The forward pass by ourselves gives the bits of the model's own code, and stands back wherever it might not."""

import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from depass_fast import DePass, Tokens
from depass_fast.adapters import Adapter
from depass_fast.trace import own_pass
from tests.support.family_models import build_model
from tests.support.models import FAMILIES, random_ids
from tests.support.trained import smollm2

PROMPTS = [torch.tensor(random_ids(n, seed=n)) for n in (11, 1, 6)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def fresh(name="llama-gqa", dtype=torch.float32):
    """An engine that has traced a prompt, so that our pass was compared with the model's own."""
    model_type, changes = FAMILIES[name]
    dp = DePass(build_model(model_type, **changes).to(dtype))
    dp.trace(PROMPTS)
    return dp


def by_the_model(dp, prompts, monkeypatch):
    """The trace by the model's own code and hooks."""
    with monkeypatch.context() as patch:
        patch.setattr(own_pass, "admitted", lambda *about: None)
        return dp.trace(prompts)


def is_used(dp, monkeypatch, prompts=PROMPTS):
    """True if a trace is taken without the model's own code."""
    called = []
    with monkeypatch.context() as patch:
        run = Adapter.run
        patch.setattr(Adapter, "run", lambda *given, **named: (called.append(1), run(*given, **named)))
        dp.trace(prompts)
    return not called


def same_bits(one, other):
    tensors = [[*(x for layer in trace.layers for x in layer.tensors()), trace.normed_final] for trace in (one, other)]
    masks = [[(x.attention.scale, x.attention.window, x.attention.softcap) for x in t.layers] for t in (one, other)]
    return masks[0] == masks[1] and all(map(torch.equal, *tensors))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAMILIES)
def test_it_gives_the_bits_of_the_models_own_code(name, dtype, monkeypatch):
    dp = fresh(name, dtype)
    assert is_used(dp, monkeypatch)
    prompts = [torch.tensor(random_ids(n, seed=n + 50)) for n in (3, 15, 15, 8)]
    assert same_bits(dp.trace(prompts), by_the_model(dp, prompts, monkeypatch))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_gives_the_bits_of_a_trained_model(dtype, monkeypatch):
    model, tokenizer = smollm2()
    try:
        dp = DePass(model.to(dtype), tokenizer)
        prompts = ["The capital of France is", "Water boils at a temperature of one hundred"]
        dp.trace(prompts)
        assert is_used(dp, monkeypatch, prompts)
        assert same_bits(dp.trace(prompts), by_the_model(dp, prompts, monkeypatch))
    finally:
        model.float()


def test_a_model_that_wants_prompts_one_by_one_gets_them_so(monkeypatch):
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    dp = DePass(build_model("llama", num_key_value_heads=2, max_position_embeddings=64, rope_scaling=scaling))
    prompts = [torch.tensor(random_ids(n)) for n in (9, 12)]
    dp.trace(prompts)
    assert dp.adapter.one_by_one and is_used(dp, monkeypatch, prompts)
    assert same_bits(dp.trace(prompts), by_the_model(dp, prompts, monkeypatch))


def test_what_changes_in_a_model_between_two_calls_is_seen(monkeypatch):
    dp = fresh("mistral-window")
    before = dp.trace(PROMPTS)
    dp.model.config.sliding_window = 2
    with torch.no_grad():
        dp.model.model.layers[1].self_attn.q_proj.weight.mul_(2.0)
        dp.model.model.norm.weight.mul_(3.0)
    assert is_used(dp, monkeypatch)
    after = dp.trace(PROMPTS)
    assert same_bits(after, by_the_model(dp, PROMPTS, monkeypatch)) and not same_bits(after, before)


def test_a_module_in_anothers_place_is_seen(monkeypatch):
    dp = fresh()
    layer = dp.model.model.layers[1]
    layer.mlp.down_proj = nn.Linear(layer.mlp.down_proj.in_features, layer.mlp.down_proj.out_features, bias=False)
    assert same_bits(dp.trace(PROMPTS), by_the_model(dp, PROMPTS, monkeypatch))


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def subclassed(dp):
    up = dp.model.model.layers[0].mlp.up_proj
    up.__class__ = Doubling


def in_two_steps(dp):
    """A projection of low rank, by two modules of torch."""
    attention = dp.model.model.layers[1].self_attn
    q = attention.q_proj
    attention.q_proj = nn.Sequential(nn.Linear(q.in_features, 4, bias=False), nn.Linear(4, q.out_features, bias=False))


def patched_forward(dp):
    q = dp.model.model.layers[1].self_attn.q_proj
    q.forward = lambda x: 2 * nn.functional.linear(x, q.weight, q.bias)


def hooked(dp):
    dp.model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda module, args, output: 2 * output)


def hooked_before(dp):
    dp.model.model.embed_tokens.register_forward_pre_hook(lambda module, args: ((args[0] + 1) % 64,))


@pytest.mark.parametrize("change", [subclassed, in_two_steps, patched_forward, hooked, hooked_before])
def test_the_models_own_code_runs_where_a_module_is_not_what_it_was(change, monkeypatch):
    dp = fresh()
    before = dp.trace(PROMPTS)
    change(dp)
    for _ in range(2):  # also behind the comparison
        assert not is_used(dp, monkeypatch)
        after = dp.trace(PROMPTS)
        assert not same_bits(after, before)
    ids = PROMPTS[0]
    own = dp.model(ids[None]).logits[0]
    assert torch.allclose(dp.adapter.unembedding(dp.trace(ids).normed_final), own, atol=1e-5)


def test_a_hook_that_only_looks_is_called(monkeypatch):
    dp, seen = fresh(), []
    handle = dp.model.model.layers[0].register_forward_hook(lambda *given: seen.append(1))
    for _ in range(2):
        dp.trace(PROMPTS)
    assert len(seen) >= 2
    handle.remove()
    assert is_used(dp, monkeypatch)


def test_a_hook_on_all_modules_is_called(monkeypatch):
    dp, seen = fresh(), []
    handle = nn.modules.module.register_module_forward_hook(lambda *given: seen.append(1))
    try:
        dp.trace(PROMPTS)
        seen.clear()
        dp.trace(PROMPTS)
        assert seen
    finally:
        handle.remove()


def test_another_rotation_in_the_models_file_is_run(monkeypatch):
    dp = fresh()
    before, home = dp.trace(PROMPTS), sys.modules[type(dp.model).__module__]
    turn = home.apply_rotary_pos_emb
    monkeypatch.setattr(home, "apply_rotary_pos_emb", lambda q, k, cos, sin, *more: turn(q, k, cos, -sin, *more))
    assert not is_used(dp, monkeypatch) and not same_bits(dp.trace(PROMPTS), before)


@pytest.mark.parametrize("part", ["turn", "add", "window"])
def test_a_pass_that_differs_is_not_admitted(part, monkeypatch):
    """Each of these is a mistake in our pass: the model's own code goes on running."""
    forward, turned = own_pass._Layer.forward, own_pass._Layer._turned
    if part == "turn":
        monkeypatch.setattr(own_pass._Layer, "_turned", lambda layer, q, k, angles: (q, turned(layer, q, k, angles)[1]))
    elif part == "add":
        monkeypatch.setattr(
            own_pass._Layer, "forward", lambda layer, x, *more: forward(layer, x, *more) + 1e-4 * x.abs().mean()
        )
    else:
        found = own_pass._Layer.of
        monkeypatch.setattr(
            own_pass._Layer, "of", lambda *given: replace(found(*given), mask=found(*given).mask | {"window": 4})
        )
    dp = fresh("mistral-window")
    assert not is_used(dp, monkeypatch)


@pytest.mark.parametrize("model_type", ["gemma2", "olmo2", "gpt2", "granite", "qwen2_moe"])
def test_other_layouts_are_left_to_the_models_own_code(model_type, monkeypatch):
    dp = DePass(build_model(model_type, **({} if model_type == "gpt2" else {"num_key_value_heads": 2})))
    dp.trace(PROMPTS)
    assert not is_used(dp, monkeypatch)


def test_nan_in_a_weight_is_found_and_named():
    dp = fresh()
    with torch.no_grad():
        dp.model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"layer 1: the weights of model\.layers\.1\.mlp\.up_proj"):
        dp.trace(PROMPTS)


def test_scores_are_those_of_a_first_call():
    dp = DePass(build_model("llama", num_key_value_heads=2))
    first, second = (dp.attribute(PROMPTS[0], Tokens()) for _ in range(2))
    assert torch.equal(first.scores, second.scores)
