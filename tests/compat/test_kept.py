"""A trace is kept while nothing that its forward pass reads has changed, and no longer."""

from __future__ import annotations

import types
from contextlib import nullcontext

import pytest
import torch

from depass_fast.adapters import adapt
from depass_fast.compat import decomposed_state_manager
from depass_fast.compat.kept import fingerprint
from tests.support.family_models import build_model, build_variant
from tests.support.models import random_ids

IDS = random_ids(5)


@pytest.fixture
def passes(monkeypatch):
    """The number of forward passes so far."""
    from depass_fast.compat import manager

    taken, take = [], manager.take_trace
    monkeypatch.setattr(manager, "take_trace", lambda *args: taken.append(1) or take(*args))
    return lambda: len(taken)


def heads(subject: decomposed_state_manager, layer: int = 1) -> torch.Tensor:
    return subject.get_layer_module_decomposed_state(IDS, layer, type="attn_head")


def test_one_forward_pass_for_all_layers(passes):
    subject = decomposed_state_manager(build_model("llama"), None)
    states = [heads(subject, layer) for layer in range(3)]
    subject.get_mlp_neuron_decomposed_state(IDS, 1)
    subject.get_last_layer_decomposed_state(IDS)
    assert passes() == 1
    for layer in range(3):
        assert torch.equal(states[layer], heads(decomposed_state_manager(subject.model, None), layer))
    taken = passes()
    subject.get_states(IDS)
    assert passes() == taken + 1, "get_states always takes one"
    subject.get_last_layer_decomposed_state(random_ids(5)[::-1])
    assert passes() == taken + 2


def swap(weight: torch.Tensor) -> None:
    weight[[1, 7]] = weight[[7, 1]].clone()


EDITS = {
    "counted": lambda m: m.model.layers[1].mlp.up_proj.weight.mul_(1.5),
    "data": lambda m: m.model.layers[1].self_attn.q_proj.weight.data.mul_(1.5),
    "one number": lambda m: m.model.layers[0].mlp.gate_proj.weight.data[3, 5].mul_(1.001),
    "two rows swapped": lambda m: swap(m.model.layers[0].mlp.gate_proj.weight.data),
    "two columns swapped": lambda m: swap(m.model.layers[0].mlp.down_proj.weight.data.T),
    "a norm": lambda m: m.model.layers[2].input_layernorm.weight.data.mul_(2),
    "the embedding": lambda m: m.model.embed_tokens.weight.data[IDS[2]].mul_(2),
    "a buffer": lambda m: m.model.rotary_emb.inv_freq.mul_(0.5),
    "a setting": lambda m: setattr(m.model.layers[0].input_layernorm, "variance_epsilon", 1.0),
    "the config": lambda m: setattr(m.config, "use_cache", not m.config.use_cache),
    "another parameter": lambda m: setattr(m.model.layers[0].mlp, "act_fn", torch.nn.ReLU()),
    "dtype": lambda m: m.double(),
}


@pytest.mark.parametrize("edit", EDITS)
def test_every_edit_is_seen(passes, edit):
    model = build_model("llama")
    subject = decomposed_state_manager(model, None)
    before = heads(subject)
    with torch.no_grad():
        EDITS[edit](model)
    after = heads(subject)
    assert passes() == 2
    assert edit == "the config" or not torch.equal(before, after)
    assert torch.equal(after, heads(decomposed_state_manager(model, None)))


def test_a_state_from_before_an_edit_is_refused():
    subject = decomposed_state_manager(build_model("llama"), None)
    subject.get_states(IDS)
    first = subject.compute_decomposed_state(0)
    subject.model.model.layers[1].mlp.up_proj.weight.data.mul_(1.5)
    with pytest.raises(ValueError, match="compute_decomposed_state: the model has changed since get_states"):
        subject.compute_decomposed_state(0)
    subject.get_states(IDS)
    assert not torch.equal(subject.compute_decomposed_state(0), first)


def test_weights_that_were_edited_and_restored(passes):
    """The published experiments zero a head's weights, counted, and put them back through `.data`, not counted."""
    subject = decomposed_state_manager(build_model("llama"), None)
    first, weight = heads(subject), subject.model.model.layers[1].self_attn.o_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[:, :8] = 0
    assert not torch.equal(heads(subject), first)
    weight.data.copy_(kept)
    assert torch.equal(heads(subject), first) and passes() == 3


def test_returned_states_are_the_users_own(passes):
    subject = decomposed_state_manager(build_model("llama"), None)
    first, states = subject.get_last_layer_decomposed_state(IDS)
    expected = [x.clone() for x in states]
    for x in states:
        x.mul_(2)
    assert torch.equal(subject.get_last_layer_decomposed_state(IDS)[0], first) and passes() == 1
    assert all(torch.equal(a, b) for a, b in zip(subject.states, expected, strict=True))
    assert torch.equal(subject.compute_decomposed_state(0), first)


def hooked(model: torch.nn.Module):
    return model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, args, output: 3 * output)


def replaced(model: torch.nn.Module) -> nullcontext:
    norm = model.model.layers[0].input_layernorm
    norm.forward = types.MethodType(type(norm).forward, norm)
    return nullcontext()


@pytest.mark.parametrize("change", [hooked, replaced])
def test_what_cannot_be_told_has_a_forward_pass_of_its_own(passes, change):
    subject = decomposed_state_manager(build_model("llama"), None)
    first = heads(subject)
    with change(subject.model):
        seen = heads(subject)
        assert torch.equal(heads(subject), seen) and passes() == 3
        assert fingerprint(adapt(subject.model), torch.tensor(IDS)) is None
    assert change is replaced or (not torch.equal(seen, first) and torch.equal(heads(subject), first))


def test_hooks_that_only_watch_do_not_count(passes):
    """Those of `output_hidden_states` stay on a model in transformers 5."""
    subject = decomposed_state_manager(build_model("llama"), None)
    subject.model(torch.tensor([IDS]), output_hidden_states=True)
    assert torch.equal(heads(subject), heads(subject)) and passes() == 1
    with torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: None):
        assert fingerprint(adapt(subject.model), torch.tensor(IDS)) is None


def test_a_model_with_tensors_elsewhere_cannot_be_told():
    model = build_model("llama")
    beside = torch.nn.Linear(2, 2)
    object.__setattr__(model.model.layers[0].mlp, "beside", beside)  # torch does not list it
    assert fingerprint(adapt(model), torch.tensor(IDS)) is None
    vars(model.model.layers[0].mlp)["beside"] = model.model.layers[1].mlp
    assert fingerprint(adapt(model), torch.tensor(IDS)) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["gpt2", "bloom", "qwen2"])
def test_other_families_and_dtypes(name, dtype):
    model = build_variant(name).to(dtype)
    adapter, ids = adapt(model), torch.tensor(IDS)
    first = fingerprint(adapter, ids)
    assert first is not None and first == fingerprint(adapter, ids) != fingerprint(adapter, ids.flip(0))
    bias = next(p for n, p in model.named_parameters() if n.endswith("bias"))
    bias.data[1] += 1
    assert first != fingerprint(adapter, ids)
