"""Calls for one layer after the other carry the layers that follow along, with the numbers of single calls."""

from __future__ import annotations

import pytest
import torch

from depass_fast.compat import ahead, decomposed_state_manager
from tests.support.family_models import build_model, build_variant
from tests.support.models import random_ids

IDS = random_ids(5)
LAYERS = 8


@pytest.fixture
def joined(monkeypatch) -> list[int]:
    """The number of layers that were carried together, every time that it was more than one."""
    found, join = [], ahead.propagate_jointly
    monkeypatch.setattr(ahead, "propagate_jointly", lambda *args: found.append(len(args[2])) or join(*args))
    return found


def ask(subject: decomposed_state_manager, layer: int, kind: str = "attn_head", ids: list[int] = IDS) -> torch.Tensor:
    if kind == "neurons":
        return subject.get_mlp_neuron_decomposed_state(ids, layer)
    return subject.get_layer_module_decomposed_state(ids, layer, type=kind)


def alone(subject: decomposed_state_manager, layer: int, kind: str = "attn_head", ids: list[int] = IDS) -> torch.Tensor:
    """The same from a single call."""
    rules = subject.mlp_softmax_temp, subject.ignore_special_token, subject.mlp_decomposed_function
    return ask(decomposed_state_manager(subject.model, None, *rules, corrected=subject.corrected), layer, kind, ids)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("corrected", [False, True])
@pytest.mark.parametrize("kind", ["attn", "mlp", "attn_head", "neurons"])
@pytest.mark.parametrize("name", ["llama: GQA", "qwen2", "gpt2", "gpt_neox: parallel", "mixtral"])
def test_numbers_are_those_of_single_calls(joined, name, kind, corrected):
    model = build_variant(name)
    subject = decomposed_state_manager(model, None, corrected=corrected)
    for layer in range(subject.num_layers):
        assert_same(ask(subject, layer, kind), alone(subject, layer, kind))
    assert (
        joined == [2] or corrected
    )  # where only one of two layers has a constant ahead, they have not the same extras


@pytest.mark.parametrize("rule", ["linear", "relu", "max", "taylor"])
def test_every_rule(joined, rule):
    subject = decomposed_state_manager(build_model("llama"), None, mlp_decomposed_function=rule)
    for layer in range(3):
        assert_same(ask(subject, layer), alone(subject, layer))
    assert joined == [2]


def deep() -> decomposed_state_manager:
    return decomposed_state_manager(build_model("llama", num_hidden_layers=LAYERS), None)


def test_the_second_call_begins_and_each_time_it_is_twice_as_many(joined):
    subject = deep()
    for layer, expected in enumerate([[], [2], [2], [2, 4], [2, 4], [2, 4], [2, 4], [2, 4]]):
        assert_same(ask(subject, layer), alone(subject, layer))
        assert joined == expected
    assert not any(calls.ready for calls in subject._ahead._calls.values()), "what was returned is not kept"


def test_kinds_in_turns_and_calls_that_are_repeated(joined):
    subject = deep()
    for layer in range(4):
        for kind in ("attn", "mlp", "attn"):
            assert_same(ask(subject, layer, kind), alone(subject, layer, kind))
    assert joined == [2, 2, 4, 4]


def test_a_jump_begins_anew(joined):
    subject = deep()
    for layer in (0, 1, 5, 2, 4, 3, 2):
        assert_same(ask(subject, layer), alone(subject, layer))
    assert joined == [2] and not any(calls.ready for calls in subject._ahead._calls.values())
    ask(subject, 3)
    assert joined == [2, 2]


EDITS = {
    "data": lambda s: s.model.model.layers[6].mlp.up_proj.weight.data.mul_(1.5),
    "counted": lambda s: s.model.model.layers[6].self_attn.v_proj.weight.mul_(1.5),
    "earlier": lambda s: s.model.model.layers[0].self_attn.q_proj.weight.data[3, 5].mul_(2),
    "final norm": lambda s: s.model.model.norm.weight.data.mul_(2),
    "temperature": lambda s: setattr(s, "mlp_softmax_temp", 1.0),
    "rule": lambda s: setattr(s, "mlp_decomposed_function", "taylor"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_what_was_carried_before_an_edit_is_not_returned(joined, edit):
    subject = deep()
    kept = [ask(subject, layer) for layer in (0, 1)]
    assert joined == [2] and subject._ahead._calls
    stale = alone(subject, 2)
    with torch.no_grad():
        EDITS[edit](subject)
    found = ask(subject, 2)
    assert_same(found, alone(subject, 2))
    assert float((found - stale).abs().max()) > 1e-5 * float(stale.abs().max()) and len(kept) == 2
    assert joined == [2], "the sequence begins anew"


def test_another_prompt_and_get_states_begin_anew(joined):
    subject, other = deep(), IDS[::-1]
    ask(subject, 0), ask(subject, 1)
    assert_same(ask(subject, 2, ids=other), alone(subject, 2, ids=other))
    ask(subject, 3, ids=other)
    assert joined == [2, 2]
    subject.get_states(other)
    assert not subject._ahead._calls
    assert_same(ask(subject, 4, ids=other), alone(subject, 4, ids=other))


def test_what_is_returned_is_the_users_own(joined):
    subject = deep()
    ask(subject, 0)
    for layer in (1, 2):
        found = ask(subject, layer)
        assert_same(found, alone(subject, layer))
        assert found.untyped_storage().nbytes() == found.numel() * found.element_size()
        found.zero_()


def test_memory_is_bounded(joined, monkeypatch):
    subject = deep()
    rows = ask(subject, 0).shape[:2].numel()
    monkeypatch.setattr(ahead, "ROWS", 3 * rows)
    for layer in range(1, LAYERS):
        assert_same(ask(subject, layer), alone(subject, layer))
        assert (
            sum(state.layout.n_rows for calls in subject._ahead._calls.values() for state, _ in calls.ready.values())
            <= 3 * rows
        )
    assert joined == [2, 3, 2]
    joined.clear()
    monkeypatch.setattr(ahead, "ROWS", 2 * rows - 1)
    subject.get_states(IDS)
    for layer in range(3):
        ask(subject, layer)
    assert not joined


def test_where_nothing_is_carried_ahead(joined):
    hooked = deep()
    hooked.model.model.layers[0].register_forward_hook(lambda module, args, output: None)
    limited = decomposed_state_manager(hooked.model, None, memory_budget=1 << 30)
    reference = decomposed_state_manager(build_model("llama"), None, backend="reference")
    for subject in (hooked, limited, reference):
        ask(subject, 0), ask(subject, 1)
    assert not joined
