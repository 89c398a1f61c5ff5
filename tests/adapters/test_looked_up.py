"""Weights of a layer are looked up once within a call, and nothing outlives it."""

import gc
import threading
import weakref
from types import SimpleNamespace

import pytest
from torch import nn

from depass_fast import DePass, Tokens
from depass_fast.adapters import Adapter, adapt, looked_up_once, without_biases
from tests.support.family_models import build_model
from tests.support.models import random_ids


def looks(adapter, index=0):
    return adapter.attention(index), adapter.mlps(index)


def is_kept(adapter):
    return [one is other for one, other in zip(looks(adapter), looks(adapter), strict=True)]


def test_plain_weights_are_kept_until_the_end_of_the_block():
    adapter = adapt(build_model("llama"))
    with looked_up_once():
        before = looks(adapter)
        assert is_kept(adapter) == [True, True]
        with looked_up_once():  # one block is within another
            assert looks(adapter)[0] is before[0]
        assert looks(adapter)[0] is before[0] and looks(adapter, 1)[0] is not before[0]
    assert is_kept(adapter) == [False, False]
    with looked_up_once():
        assert looks(adapter)[0] is not before[0]


def test_an_error_ends_it():
    adapter = adapt(build_model("llama"))
    with pytest.raises(KeyError), looked_up_once():
        looks(adapter)
        raise KeyError
    assert is_kept(adapter) == [False, False]


@pytest.mark.parametrize(("model_type", "kept"), [("gpt_neox", [False, True]), ("phi3", [False, False])])
def test_parts_of_fused_weights_are_not_kept(model_type, kept):
    """They may be copies, which a layer after the other would hold."""
    shape = {} if model_type == "gpt_neox" else {"num_key_value_heads": 2, "pad_token_id": 0}
    with looked_up_once():
        assert is_kept(adapt(build_model(model_type, **shape))) == kept


def test_a_weight_that_is_computed_is_not_kept():
    model = build_model("llama")
    nn.utils.parametrize.register_parametrization(model.model.layers[0].mlp.down_proj, "weight", nn.Identity())
    with looked_up_once():
        assert is_kept(adapt(model)) == [True, False]


def test_a_weight_that_is_dequantised_is_not_kept():
    model = build_model("llama")
    down = model.model.layers[0].mlp.down_proj
    down.weight_qtype, down.qweight = "int8", SimpleNamespace(dequantize=lambda: down.weight.detach().clone())
    with looked_up_once():
        assert is_kept(adapt(model)) == [True, False]


def test_an_adapter_lives_as_long_as_what_was_found_through_it():
    """Another one in its place in memory would be taken for it."""
    adapter = adapt(build_model("llama"))
    seen = weakref.ref(adapter)
    with looked_up_once():
        looks(adapter)
        del adapter
        gc.collect()
        assert seen() is not None
    gc.collect()
    assert seen() is None


def test_adapters_of_one_model_do_not_share():
    adapter = adapt(build_model("llama", attention_bias=True, mlp_bias=True))
    with looked_up_once():
        assert looks(adapter)[0].o.has_bias
        assert not looks(without_biases(adapter))[0].o.has_bias and looks(adapter)[0].o.has_bias


def test_another_thread_has_nothing_of_it():
    adapter, found = adapt(build_model("llama")), []
    with looked_up_once():
        mine = looks(adapter)[0]
        thread = threading.Thread(target=lambda: found.append(looks(adapter)[0]))
        thread.start()
        thread.join()
    assert found[0] is not mine


@pytest.mark.parametrize("call", ["attribute", "ledger", "decompose"])
def test_a_call_looks_once(call, monkeypatch):
    dp, looked, find = DePass(build_model("llama")), [], Adapter._attention
    prompt = random_ids(5)
    run = {
        "attribute": lambda: dp.attribute(dp.trace(prompt), Tokens(), 7),
        "ledger": lambda: dp.ledger(prompt, 7).tokens(),
        "decompose": lambda: dp.decompose(prompt, Tokens()),
    }[call]
    run()
    monkeypatch.setattr(Adapter, "_attention", lambda adapter, index: (looked.append(index), find(adapter, index))[1])
    run()
    assert len(looked) <= 4 * dp.adapter.n_layers


def test_a_module_that_is_replaced_between_two_calls_is_seen():
    dp, prompt = DePass(build_model("llama")), random_ids(5)
    before = dp.attribute(prompt, Tokens(), 7)
    old = dp.model.model.layers[1].mlp.down_proj
    dp.model.model.layers[1].mlp.down_proj = nn.Linear(old.in_features, old.out_features, bias=False)
    after = dp.attribute(prompt, Tokens(), 7)
    assert after.completeness_error < 1e-5 and (after.scores != before.scores).any()
