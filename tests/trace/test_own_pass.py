"""The forward pass by ourselves gives the bits of the model's own code, and stands back wherever it might not."""

import functools
import inspect
import textwrap
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama import modeling_llama

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


class OwnMlp(modeling_llama.LlamaMLP):
    """A class of a user's, which may override anything that the code of its base calls."""


class Marked(nn.Parameter):
    """A weight of a kind of its own, as quantised ones are."""


def two(module, args, output=None):
    return None


def changed(change):
    """A change of a model, as a parameter with its name."""
    return pytest.param(change, id=change.__name__)


def a_subclass(model):
    model.model.layers[0].mlp.up_proj.__class__ = Doubling


def a_class_of_a_users(model):
    model.model.layers[0].mlp.__class__ = OwnMlp


def two_steps(model):
    """A projection of low rank, by two modules of torch."""
    attention = model.model.layers[1].self_attn
    q = attention.q_proj
    attention.q_proj = nn.Sequential(nn.Linear(q.in_features, 4, bias=False), nn.Linear(4, q.out_features, bias=False))


def a_forward_of_its_own(model):
    q = model.model.layers[1].self_attn.q_proj
    q.forward = lambda x: nn.functional.linear(x, q.weight, q.bias)


def a_hook(model):
    model.model.layers[1].self_attn.k_proj.register_forward_hook(two)


def a_hook_in_front(model):
    model.model.embed_tokens.register_forward_pre_hook(two)


def a_hook_on_gradients(model):
    model.model.layers[0].mlp.register_full_backward_hook(lambda *given: None)


def a_weight_of_another_kind(model):
    down = model.model.layers[0].mlp.down_proj
    down.weight = Marked(down.weight.data)


def another_dtype(model):
    model.model.norm.double()


def fewer_layers(model):
    model.config.num_hidden_layers = 2


def a_layer_twice(model):
    model.model.layers[2] = model.model.layers[0]


def another_norm(model):
    model.model.layers[0].input_layernorm = nn.RMSNorm(model.config.hidden_size, eps=1e-6)


def a_hidden_norm(model):
    block = model.model.layers[0]
    object.__setattr__(block, "input_layernorm", lambda x, norm=block.input_layernorm: 2 * norm(x))


def a_hidden_final_norm(model):
    object.__setattr__(model.model, "norm", lambda x, norm=model.model.norm: 2 * norm(x))


def a_layer_of_another_model(model):
    model.model.layers[1] = build_model("qwen3", num_key_value_heads=2).model.layers[1]


CHANGES = [
    *(a_subclass, two_steps, a_forward_of_its_own, a_hook, a_hook_in_front, a_hook_on_gradients),
    *(a_weight_of_another_kind, another_dtype, fewer_layers, a_layer_twice, another_norm, a_hidden_norm),
    *(a_hidden_final_norm, a_layer_of_another_model, a_class_of_a_users),
]


@pytest.mark.parametrize("change", [changed(one) for one in CHANGES])
def test_it_is_for_models_as_transformers_defines_them(change):
    """Some of these change no number: that they are there is enough."""
    dp = fresh()
    assert own_pass.OwnPass.of(dp.adapter) is not None
    change(dp.model)
    assert own_pass.OwnPass.of(dp.adapter) is None


@pytest.mark.parametrize("hook", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_a_hook_on_all_modules_is_called(hook, monkeypatch):
    dp = fresh()
    handle = getattr(nn.modules.module, hook)(two)
    try:
        for _ in range(2):  # also behind the comparison
            assert not is_used(dp, monkeypatch)
    finally:
        handle.remove()
    assert is_used(dp, monkeypatch)


STATE = {"by": 1.0}  # of functions that a user puts in the place of others


def with_factor(function):
    """The function with what it gives multiplied: by one, at first."""

    def patched(*given, **named):
        found = function(*given, **named)
        return tuple(one * STATE["by"] for one in found) if isinstance(found, tuple) else found * STATE["by"]

    return patched


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (modeling_llama.LlamaRMSNorm, "forward"),
        (modeling_llama.LlamaMLP, "forward"),
        (modeling_llama.LlamaMLP, "__call__"),
        (modeling_llama.LlamaRotaryEmbedding, "forward"),
        (nn.Linear, "forward"),
        (modeling_llama, "apply_rotary_pos_emb"),
        (modeling_llama, "rotate_half"),
    ],
    ids=lambda given: getattr(given, "__name__", given),
)
@pytest.mark.parametrize("keeps_its_name", [False, True])
def test_what_a_user_patches_is_run_also_when_its_state_changes(place, name, keeps_its_name, monkeypatch):
    """At first the patch changes nothing, so that the comparison finds nothing."""
    function = getattr(place, name)
    patched = with_factor(function)
    monkeypatch.setattr(place, name, functools.wraps(function)(patched) if keeps_its_name else patched)
    monkeypatch.setitem(STATE, "by", 1.0)
    dp = fresh()
    assert not is_used(dp, monkeypatch)
    monkeypatch.setitem(STATE, "by", 1.5)
    found = []
    for trace in (dp.trace, lambda prompts: by_the_model(dp, prompts, monkeypatch)):
        try:
            found.append(trace(PROMPTS))
        except RuntimeError as error:  # the comparison with the family's declaration, as it was without our pass
            found.append(str(error))
    assert found[0] == found[1] if isinstance(found[1], str) else same_bits(*found)


def factor():
    return STATE["by"]


def test_source_that_was_edited_and_run_in_the_models_file_is_a_users(monkeypatch):
    """Its functions say that they belong there."""
    edited = inspect.getsource(modeling_llama.LlamaMLP.forward).replace(
        "return down_proj", "return factor() * down_proj"
    )
    assert "factor()" in edited
    monkeypatch.setattr(modeling_llama, "factor", factor, raising=False)
    found = {}
    exec(textwrap.dedent(edited), vars(modeling_llama), found)
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", found["forward"])
    dp = fresh()
    assert own_pass.OwnPass.of(dp.adapter) is None


def test_other_code_in_a_function_is_seen(monkeypatch):
    dp = fresh()
    monkeypatch.setattr(modeling_llama.LlamaMLP.forward, "__code__", (lambda self, x: 2 * x).__code__)
    assert own_pass.OwnPass.of(dp.adapter) is None


def test_another_way_of_calling_modules_is_seen(monkeypatch):
    dp, call = fresh(), nn.Module._call_impl
    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "_call_impl", lambda *given, **named: call(*given, **named))
        assert own_pass.OwnPass.of(dp.adapter) is None
    assert is_used(dp, monkeypatch)
    dp.model.model.layers[0].mlp._call_impl = lambda x: x
    assert own_pass.OwnPass.of(dp.adapter) is None


class Seeing(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Seeing, Dispatched])
def test_a_mode_sees_the_models_own_operations(mode, monkeypatch):
    dp = fresh()
    with mode():
        assert not is_used(dp, monkeypatch)
    with torch.device("cpu"):
        assert is_used(dp, monkeypatch)


def test_what_a_decorator_of_torch_wraps_is_looked_at(monkeypatch):
    turn = modeling_llama.rotate_half
    monkeypatch.setattr(modeling_llama, "rotate_half", torch.no_grad()(lambda x: turn(x)))
    dp = fresh()
    assert own_pass.OwnPass.of(dp.adapter) is None


def test_a_function_that_is_an_object_is_left_to_the_model(monkeypatch):
    class Turn:
        __slots__ = ()

        def __call__(self, *given):
            return turn(*given)

    turn = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", Turn())
    dp = fresh()
    assert not is_used(dp, monkeypatch)


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
