"""The forward pass by ourselves gives the bits of the model's own code, and is admitted by comparison."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from depass_fast import DePass, Tokens
from depass_fast.trace import consistency, own_pass
from tests.support.family_models import build_model
from tests.support.models import FAMILIES, random_ids
from tests.support.own_passes import PROMPTS, by_the_model, fresh, is_used, same_bits
from tests.support.trained import smollm2

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


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


def test_a_hook_that_only_looks_is_called(monkeypatch):
    dp, seen = fresh(), []
    handle = dp.model.model.layers[0].register_forward_hook(lambda *given: seen.append(1))
    for _ in range(2):
        dp.trace(PROMPTS)
    assert len(seen) >= 2
    handle.remove()
    assert is_used(dp, monkeypatch)


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


def compared(monkeypatch):
    """Our pass, and what it was compared with."""
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(own_pass, "admit", lambda adapter, computation, *given: seen.append(given))
        dp = fresh()
    own = own_pass.OwnPass.of(dp.adapter)
    assert own is not None
    return own, *seen[0]


def test_the_comparison_is_of_everything(monkeypatch):
    own, trace, records = compared(monkeypatch)
    assert own.agrees(trace, records)
    for record in records:
        for name in ("resid_pre", "q", "k", "resid_mid", "gate", "act"):
            kept = record[name]
            record[name] = kept * (1 + 1e-6)
            assert not own.agrees(trace, records), name
            record[name] = kept
    records[1]["mask"] = records[1]["mask"] | {"chunked": True}
    assert not own.agrees(trace, records)
    records[1]["mask"]["chunked"] = False
    del records[2]["gate"]
    assert not own.agrees(trace, records)
    own, trace, records = compared(monkeypatch)
    with torch.no_grad():
        own.adapter.embedding.weight.mul_(1 + 1e-6)
    assert not own.agrees(trace, records)
    own, trace, records = compared(monkeypatch)
    for end in ("resid_final", "normed_final"):
        assert not own.agrees(replace(trace, **{end: getattr(trace, end) * (1 + 1e-6)}), records)


def test_a_single_token_admits_nothing(monkeypatch):
    dp = DePass(build_model("llama", num_key_value_heads=2))
    dp.trace([PROMPTS[1], PROMPTS[1]])
    assert not is_used(dp, monkeypatch, PROMPTS[1])
    dp.trace(PROMPTS)
    assert is_used(dp, monkeypatch, PROMPTS[1])


def test_what_a_longer_prompt_shows_is_remembered(monkeypatch):
    """A mistake that begins at position 8."""
    turned = own_pass._Layer._turned

    def early(layer, q, k, angles):
        q, k = turned(layer, q, k, angles)
        return torch.cat([q[:8], 2 * q[8:]]), k

    monkeypatch.setattr(own_pass._Layer, "_turned", early)
    short, long = (torch.tensor(random_ids(n)) for n in (6, 20))
    dp = DePass(build_model("llama", num_key_value_heads=2))
    dp.trace(short)
    assert is_used(dp, monkeypatch, short) and not is_used(dp, monkeypatch, long)
    assert not is_used(dp, monkeypatch, long) and not is_used(dp, monkeypatch, short)


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


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), ValueError("another")])
def test_memory_that_runs_out_in_the_comparison_fails_no_call(error, monkeypatch):
    def fails(*given):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(own_pass.OwnPass, "agrees", fails)
        if isinstance(error, ValueError):
            with pytest.raises(ValueError, match="another"):
                fresh()
            return
        dp = fresh()
    assert not is_used(dp, monkeypatch)


def test_another_kind_of_device_is_compared_anew(monkeypatch):
    dp = fresh()
    monkeypatch.setattr(type(dp.adapter), "device", torch.device("meta"))
    assert own_pass.admitted(dp.adapter, consistency.computation(dp.model)) is None
    monkeypatch.undo()
    assert own_pass.admitted(dp.adapter, consistency.computation(dp.model)) is not None


def test_elsewhere_layers_may_differ_by_rounding(monkeypatch):
    """On a CPU the bits are compared: what is compared on a GPU is tried alone."""
    monkeypatch.setattr(own_pass, "_ROWS", 3)
    x = torch.randn(8, 4, device="cpu").bfloat16()
    near, far = x * (1 + 2**-8), x.clone()
    far[7] *= 1.1
    for other, is_same in ((x, True), (near, True), (far, False)):
        assert own_pass.are_rounded_alike([(x, x), (x, other)]) is is_same
