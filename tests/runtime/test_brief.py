"""Short representations: no public object's takes more than two thousand characters."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from depass_fast import Custom, DePass, Features, Heads, Modules, Neurons, Options, Subspaces, Tokens
from depass_fast.runtime.brief import brief, cut
from tests.support.family_models import build_model
from tests.support.models import random_ids

IDS = random_ids(40)
WORDS = [f"a word of some length, number {i}" for i in range(500)]


@pytest.fixture(scope="module")
def dp() -> DePass:
    return DePass(build_model("llama", num_key_value_heads=2, num_hidden_layers=6, intermediate_size=400).eval())


def test_results(dp):
    one = dp.attribute(IDS, Neurons(2), list(range(60)))
    one.warnings = WORDS
    one.target_names[0] = "x" * 9000
    layered = dp.attribute(IDS, Neurons(layers="all"), 3)
    generation = dp.attribute_generation(IDS, max_new_tokens=20)
    for result in (one, layered, generation):
        text = repr(result)
        assert len(text) <= 2000 and "\n" not in text
    (label, score), *_ = layered.top(1)
    assert f"leading: {label} {score:+.4g}" in repr(layered) and "neurons at 6 layers" in repr(layered)
    assert repr(layered).startswith("LayeredAttribution(id 3 at position 39 (after ")
    assert "WARNING" in repr(one) and "57 targets more" in repr(one)
    assert repr(generation).startswith("Generation(40 tokens of a prompt, 20 generated: ")


def test_states_and_traces(dp):
    prompts = [IDS] * 300
    trace = dp.trace(prompts)
    assert repr(trace).startswith(
        "Trace(prompts of [40, 40, 40, 40, ... 300 in all] tokens, 6 layers of width 32, float32"
    )
    state, focus = dp.decompose(IDS, Neurons(2)), dp.focus(IDS, Neurons(2), list(range(300)))
    assert "components ['L2N0', 'L2N1', 'L2N2', 'L2N3', ... 401 in all]; rows <float32 tensor (16040, 32)" in repr(
        state
    )
    values = [trace, trace.layers[0], trace.layers[0].attention, trace.layers[0].mlp, state, state.layout]
    values += [state.layout.components[0], focus, focus.partition, dp, dp.plan(prompts, Tokens())]
    for value in values:
        assert len(repr(value)) <= 2000 and repr(value).startswith(type(value).__name__)


def test_requests():
    tensor, sae = torch.zeros(40, 300, 64), SimpleNamespace(encode=0, decode=0, W_dec=torch.zeros(900, 64))
    kinds = [
        Custom(2, states=tensor, labels=WORDS),
        Subspaces(2, bases=[np.zeros((64, 2))] * 300, labels=WORDS),
        Features(2, sae=sae, site="resid_pre"),
        Neurons(layers=list(range(1000))),
        Modules(layers=tuple(WORDS)),
    ]
    for value in (*kinds, Options(exclude_special=list(range(9000)))):
        assert len(repr(value)) <= 2000
    assert repr(Custom(2, states=tensor)) == (
        "Custom(layer=2, states=<float32 tensor (40, 300, 64) on cpu>, labels=None, site='resid_pre')"
    )
    assert repr(Tokens()) == "Tokens(layer=0)" and repr(Heads(3)) == "Heads(layer=3, layers=None)"
    assert "bases=(<float64 tensor (64, 2) on cpu>, " in repr(kinds[1]) and "500 in all]" in repr(kinds[1])


def test_values_in_brief():
    assert brief([1, 2]) == "[1, 2]" and brief((1,)) == "(1,)" and brief({}) == "{}" and brief(()) == "()"
    assert brief(list(range(9))) == "[0, 1, 2, 3, ... 9 in all]"
    assert brief({"a": torch.zeros(3)}) == "{'a': <float32 tensor (3,) on cpu>}"
    assert brief(torch.nn.Linear(2, 2)) == "<Linear>"
    assert cut("0123456789", 10) == "0123456789"
    assert cut("0123456789" * 3, 10) == "0123 ... 9" and len(cut("0123456789" * 3, 17)) == 17


def test_terminals_without_the_characters(dp, monkeypatch):
    result = dp.attribute(IDS, Tokens())
    result.target_names[:] = ["'日'"]
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert repr(result).startswith(r"Attribution('\u65e5' at position")
