"""Bad input of a ledger is refused by name, before any work where that is possible."""

import copy
import pickle

import pytest
import torch

from depass_fast import Adjoint, Custom, DePass, Heads, Neurons, Tokens
from tests.support.models import build, random_ids

IDS, OTHER = random_ids(7), random_ids(4, seed=1)


@pytest.fixture(scope="module")
def dp():
    return build("llama-gqa")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("softmax", "rule: 'softmax' is not linear, .*neurons of all layers .* method='adjoint' of attribute"),
        ("relu", "rule: 'relu' is not linear, .*one layer at a time, with allocation= of attribute"),
        ("max", "rule: 'max' is not linear, .*one layer at a time"),
        (len, "rule: len is not linear, .*one layer at a time"),
        ("shapely", "rule: unknown rule 'shapely'; the linear rules, .* are 'taylor', 'half', 'shapley'"),
        ("Shapley", "rule: unknown rule 'Shapley'; the linear rules"),
        (3, "rule: unknown rule 3; the linear rules"),
        (["half"], r"rule: unknown rule \['half'\]; the linear rules"),
    ],
)
def test_a_rule_that_is_not_linear(dp, rule, message):
    with pytest.raises(ValueError, match=message):
        dp.ledger(IDS, rule=rule)
    with pytest.raises(ValueError, match=message):
        dp.plan(7, "ledger", rule=rule, measure=False)


def test_a_rule_of_none_is_the_allocation_where_that_is_linear(dp):
    for own, expected in (("half", "half"), ("taylor", "taylor"), ("softmax", "shapley"), ("relu", "shapley")):
        assert DePass(dp.model, allocation=own).ledger(IDS, rule=None).rule == expected


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"allocation": "half"}, TypeError, "allocation: a ledger takes it as rule="),
        ({"stream": True}, ValueError, "stream: a ledger carries no states"),
        ({"verify": True}, ValueError, "verify: a ledger carries no states"),
        ({"method": "adjoint"}, TypeError, "method: .* no method to choose, and nothing to refine or to sample"),
        ({"refine": 3}, TypeError, "refine: .* nothing to refine"),
        ({"sample": 3}, TypeError, "sample: .* nothing to refine or to sample"),
        ({"continuation": [1]}, TypeError, r"continuation: a ledger has targets; .*attribute\(..., continuation=...\)"),
        ({"end": 1}, TypeError, r"end: .*attribute\(..., end=...\)"),
        ({"layer": 1}, TypeError, "layer: a ledger is of all layers and kinds"),
        ({"memory_budget": -1}, ValueError, "memory_budget"),
        ({"target": 64}, ValueError, "target: id 64"),
        ({"target": [1, -1]}, ValueError, "target"),
        ({"target": torch.ones(31)}, ValueError, "target"),
        ({"targets": [1]}, ValueError, r"targets: expected one per prompt \(2\)"),
        ({"target": "word"}, ValueError, "tokenizer"),
        ({"position": 7}, ValueError, "position"),
        ({"position": [0, -5]}, ValueError, "position"),
        ({"position": []}, ValueError, "position"),
    ],
)
def test_what_a_ledger_is_given(dp, given, error, message, monkeypatch):
    monkeypatch.setattr("depass_fast.request.capture", None)  # before any work
    with pytest.raises(error, match=message):
        dp.ledger([IDS, OTHER], **given)


def test_options_of_the_model_that_carry_states(dp):
    with pytest.raises(ValueError, match="stream: a ledger carries no states"):
        DePass(dp.model, stream=True).ledger(IDS)
    assert DePass(dp.model, stream=True).ledger(IDS, stream="auto").heads(0).n_extras == 1


@pytest.mark.parametrize("numbers", [{"refine": 4, "sample": 0}, {"refine": 0, "sample": 8}])
def test_there_is_nothing_to_refine_or_to_sample(dp, numbers):
    sweep = Adjoint(**numbers)
    for rule in ("half", "shapley"):
        with pytest.raises(ValueError, match=rf"linear rule '{rule}' the adjoint is exact, with nothing to refine"):
            dp.attribute(IDS, Neurons(1), method=sweep, allocation=rule)
    with pytest.raises(ValueError, match="stream: method='adjoint' holds no state"):
        dp.attribute(IDS, Neurons(1), method="adjoint", allocation="half", stream=True)
    assert dp.attribute(IDS, Neurons(1), allocation="half", stream=True).method == "exact"
    assert dp.attribute(IDS, Neurons(1), allocation="half", verify=True).verification.passed


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (lambda ledger: ledger.heads(3), ValueError, "layer: 3 is out of range"),
        (lambda ledger: ledger.neurons(layers=[]), ValueError, "layers"),
        (lambda ledger: ledger.neurons(0, layers=[1]), ValueError, r"layer: 0 beside layers=\[1\]; give one"),
        (lambda ledger: ledger.heads(1, layers="all"), ValueError, "layer: 1 beside layers='all'; give one"),
        (lambda ledger: ledger.modules(1, layers=[1]), ValueError, "layer: 1 beside layers"),
        (lambda ledger: ledger.features(None, 1, layers=[1]), ValueError, "layer: 1 beside layers"),
        (lambda ledger: ledger.neurons("all"), ValueError, "layer: 'all' is no layer; .* layers='all'"),
        (lambda ledger: ledger.scores("heads"), TypeError, r"components: expected Tokens\(\)"),
        (lambda ledger: ledger.modules(1, "both of them"), ValueError, "which"),
        (lambda ledger: ledger.custom(0, torch.ones(7, 1, 31)), ValueError, "states"),
        (lambda ledger: ledger.custom(0, torch.ones(5, 1, 32)), ValueError, "states"),
        (lambda ledger: ledger.custom(0, torch.full((7, 1, 32), torch.nan)), ValueError, "NaN"),
        (lambda ledger: ledger.subspaces(0, [torch.ones(32), torch.ones(32)]), ValueError, "bases"),
        (lambda ledger: ledger.features(object(), 1, "resid_pre"), TypeError, "sae"),
        (lambda ledger: ledger.top(kinds=("heads", "features")), ValueError, "kinds: .*'tokens', .* got 'features'"),
        (lambda ledger: ledger.top(kinds="heads"), ValueError, "kinds: expected a list"),
        (lambda ledger: ledger.top(by="size"), ValueError, "by: 'size' is not one of 'magnitude'"),
        (lambda ledger: ledger.top(0), ValueError, "k: 0 is out of range"),
        (lambda ledger: ledger.top(0, kinds=[]), ValueError, "k: 0 is out of range"),
        (lambda ledger: ledger.top("5"), TypeError, "k: expected an integer, got '5'"),
        (lambda ledger: ledger.top(5.5), TypeError, "k: expected an integer, got 5.5"),
        (lambda ledger: ledger.top(3, prompt="x"), TypeError, "prompt: expected an integer, got 'x'"),
        (lambda ledger: ledger.top(3, read=None), TypeError, "read: expected an integer, got None"),
        (lambda ledger: ledger.top(3, target=0.5), TypeError, "target: expected an integer, got 0.5"),
        (lambda ledger: ledger.view(0), ValueError, "top: 0 is out of range; it must be at least 1"),
        (lambda ledger: ledger.view("3"), TypeError, "top: expected an integer, got '3'"),
        (lambda ledger: ledger.to_dict(prompt="x"), TypeError, "prompt: expected an integer"),
        (lambda ledger: ledger.heads(0).top("5"), TypeError, "k: expected an integer, got '5'"),
        (lambda ledger: pickle.dumps(ledger), TypeError, r"Ledger: .*neither pickled nor copied. save\(path\)"),
        (lambda ledger: copy.deepcopy(ledger), TypeError, "Ledger: .*neither pickled nor copied"),
        (lambda ledger: ledger.top(prompt=1), IndexError, "prompt: 1 is out of range; this ledger holds 1"),
        (lambda ledger: ledger.top(read=-2), IndexError, "read: -2 is out of range; this ledger holds 1"),
        (lambda ledger: ledger.top(target=1), IndexError, "target: 1 is out of range"),
        (lambda ledger: ledger.view(prompt=2), IndexError, "prompt: 2 is out of range"),
        (lambda ledger: ledger.view(target=3), IndexError, "target: 3 is out of range"),
        (lambda ledger: ledger.to_dict(read=1), IndexError, "read: 1 is out of range"),
    ],
)
def test_what_a_ledger_is_asked(dp, ask, error, message):
    with pytest.raises(error, match=message):
        ask(dp.ledger(IDS))


def test_components_of_one_prompt_are_not_asked_of_several(dp):
    ledger = dp.ledger([IDS, OTHER])
    with pytest.raises(ValueError, match="states"):
        ledger.custom(0, torch.ones(7, 1, 32))
    with pytest.raises(ValueError, match="states"):
        dp.attribute([IDS, OTHER], Custom(0, torch.ones(7, 1, 32)), allocation="half")


def test_a_ledger_of_weights_that_have_changed(dp):
    edited = DePass(copy.deepcopy(dp.model))
    ledger = edited.ledger(IDS)
    with torch.no_grad():
        edited.model.model.layers[0].self_attn.v_proj.weight[0, 0] += 1
    for ask in (ledger.heads, ledger.top, lambda: str(ledger), lambda: ledger.scores(Tokens())):
        with pytest.raises(ValueError, match="ledger: the model's weights have changed since it was made"):
            ask()


@pytest.mark.parametrize("where", ["mlp.up_proj", "mlp.down_proj", "self_attn.o_proj"])
def test_nan_in_the_weights(dp, where):
    broken = DePass(copy.deepcopy(dp.model))
    with torch.no_grad():
        broken.model.model.layers[1].get_submodule(where).weight[2, 3] = torch.nan
    with pytest.raises(FloatingPointError, match="layer 1"):
        broken.ledger(IDS, 5)
    with pytest.raises(FloatingPointError, match="layer 1"):
        broken.attribute(IDS, Heads(0), 5, allocation="half")
