"""Our own forward pass is for models as transformers defines them; the model's own code runs everywhere else."""

import functools
import inspect
import textwrap

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama import modeling_llama

from depass_fast.trace import own_pass
from tests.support.family_models import build_model
from tests.support.own_passes import PROMPTS, by_the_model, fresh, is_used, same_bits


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
    assert own_pass.can_run(dp.adapter)
    change(dp.model)
    assert not own_pass.can_run(dp.adapter)


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
    assert not own_pass.can_run(dp.adapter)


def test_other_code_in_a_function_is_seen(monkeypatch):
    dp = fresh()
    monkeypatch.setattr(modeling_llama.LlamaMLP.forward, "__code__", (lambda self, x: 2 * x).__code__)
    assert not own_pass.can_run(dp.adapter)


def test_another_way_of_calling_modules_is_seen(monkeypatch):
    dp, call = fresh(), nn.Module._call_impl
    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "_call_impl", lambda *given, **named: call(*given, **named))
        assert not own_pass.can_run(dp.adapter)
    assert is_used(dp, monkeypatch)
    dp.model.model.layers[0].mlp._call_impl = lambda x: x
    assert not own_pass.can_run(dp.adapter)


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
    assert not own_pass.can_run(dp.adapter)


def test_a_function_that_is_an_object_is_left_to_the_model(monkeypatch):
    class Turn:
        __slots__ = ()

        def __call__(self, *given):
            return turn(*given)

    turn = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", Turn())
    dp = fresh()
    assert not is_used(dp, monkeypatch)


def module_around(function, home="kernels.layer.layer"):
    """A module that runs a function, as the package `kernels` puts one in its place."""
    namespace = {"__name__": home, "nn": nn}
    source = """
    def around(func):
        class Func(nn.Module):
            def forward(self, *args, **kwargs):
                return func(*args, **kwargs)
        return Func()
    """
    exec(textwrap.dedent(source), namespace)
    return namespace["around"](function)


def test_a_module_around_a_function_runs_it_as_long_as_no_kernel_is_put_in(monkeypatch):
    turn = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", module_around(turn))
    dp = fresh()
    assert is_used(dp, monkeypatch)
    monkeypatch.setattr(modeling_llama.apply_rotary_pos_emb, "forward", lambda *given, **named: given[:2])
    assert not own_pass.can_run(dp.adapter)
    of_a_user, by_a_user = module_around(turn), module_around(turn, "a_users")
    type(of_a_user).__module__, type(by_a_user).__module__ = "a_users", own_pass._KERNELS
    called, scripted = module_around(turn), torch.jit.script(nn.Identity())
    type(called).forward = functools.partial(turn)
    others = (module_around(lambda *given: turn(*given)), of_a_user, by_a_user, called, scripted, nn.Identity())
    for other in others:
        monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", other)
        assert not own_pass.can_run(dp.adapter)
