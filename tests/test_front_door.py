"""The front door: what it exports, the arguments of a call, and what a state remembers."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

import depass_fast
from depass_fast import Adjoint, DePass, Heads, Neurons, Options, Tokens, options
from depass_fast.demo import load_demo
from tests.support.models import build, random_ids

IDS = random_ids(7)


def test_every_name_is_exported_once_for_editors_and_once_for_users():
    tree = ast.parse(Path(depass_fast.__file__).read_text(encoding="utf-8"))
    (typed,) = [node for node in tree.body if isinstance(node, ast.If)]
    homes = {alias.name: node.module for node in typed.body for alias in node.names}
    assert homes == depass_fast._HOME
    assert sorted([*homes, "__version__"]) == sorted(depass_fast.__all__)
    for name, home in homes.items():
        assert getattr(depass_fast, name).__module__ == f"depass_fast.{home}", name
    with pytest.raises(AttributeError, match="no attribute 'DePas'"):
        _ = depass_fast.DePas


def test_the_options_that_an_editor_knows_are_those_that_there_are():
    assert options.OptionValues.__annotations__.keys() == Options.__dataclass_fields__.keys()


def test_a_contrast_joins_the_target():
    dp = build("qwen2")
    pair, joined = dp.attribute(IDS, Tokens(), (3, 5)), dp.attribute(IDS, Tokens(), 3, contrast=5)
    assert torch.equal(pair.scores, joined.scores) and joined.contrast_ids == [5]
    several = dp.attribute(IDS, Heads(1), [3, None], contrast=5)
    own = int(several.target_ids[1])
    assert several.contrast_ids == [5, 5]
    assert torch.allclose(several.scores[1], dp.attribute(IDS, Heads(1), (own, 5)).scores, atol=1e-6)
    assert dp.attribute([IDS, IDS], Tokens(), targets=[3, 4], contrast=5)[1].target_ids == [4]


def test_a_contrast_by_name():
    dp = DePass(*load_demo())
    prompt = "Nyria Morstam speaks"
    joined = dp.attribute(prompt, Tokens(), " Dutch", contrast=" Greek")
    assert joined.target_names == ["' Dutch' - ' Greek'"]
    assert torch.equal(joined.scores, dp.attribute(prompt, Tokens(), (" Dutch", " Greek")).scores)


@pytest.mark.parametrize(
    ("target", "contrast", "error", "message"),
    [
        ((3, 4), 5, ValueError, "contrast: it is subtracted from a token's logit"),
        (torch.ones(32), 5, ValueError, "contrast: it is subtracted from a token's logit"),
        (3, 64, ValueError, "contrast: id 64 is outside the vocabulary"),
        (3, " Paris", ValueError, "contrast ' Paris': a tokenizer is needed"),
        (3, 1.5, TypeError, "contrast: expected a token id or a string of one token"),
        (3, (4, 5), TypeError, "contrast: expected a token id or a string of one token"),
        (3, 3, ValueError, "contrast: it is the target itself"),
    ],
)
def test_a_contrast_that_is_none(target, contrast, error, message, monkeypatch):
    dp = build("llama-gqa")
    monkeypatch.setattr("depass_fast.request.capture", lambda *_: pytest.fail("work was done"))
    with pytest.raises(error, match=message):
        dp.attribute(IDS, Tokens(), target, contrast=contrast)


@pytest.mark.parametrize("method", ["fast", 3, Adjoint])
def test_a_method_that_is_none(method):
    with pytest.raises(ValueError, match=r"method: .* is not one of None, 'exact', 'adjoint', Adjoint\(...\)"):
        build("llama-gqa").attribute(IDS, Neurons(0), method=method)


def test_a_state_keeps_the_error_that_was_measured_on_its_way():
    dp = build("llama-gqa")
    trace = dp.trace([IDS, IDS[:3]])
    state = dp.decompose(trace, Tokens())
    assert 0 < state.completeness_error < 1e-5
    results = dp.attribute(trace, Tokens(), 3)
    assert state.completeness_error >= max(float(result.layer_errors.max()) for result in results) * 0.99
    begun = dp.start(trace, Tokens())
    assert begun.completeness_error is None
    begun.rows[:] *= 0.9  # a tenth is missing from here on
    half = dp.carry(trace, begun, 1)
    assert half.completeness_error == pytest.approx(0.1, abs=0.05)
    repaired = dp.carry(trace, half, allocation="taylor")
    assert repaired.completeness_error >= half.completeness_error


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda dp, trace: dp.carry("text", dp.start(trace, Tokens())), TypeError, "trace: expected dp.trace"),
        (lambda dp, trace: dp.carry(trace, None), TypeError, "state: expected dp.start"),
        (lambda dp, trace: dp.focus(trace, Tokens(), [0], partition=3), TypeError, "partition: expected dp.partition"),
        (lambda dp, trace: dp.focus(trace, Tokens(), [1.7]), TypeError, "which: expected an integer, got 1.7"),
        (lambda dp, trace: dp.focus(trace, Tokens(), [True]), TypeError, "which: expected an integer, got True"),
        (lambda dp, trace: dp.attribute([IDS, IDS], Tokens(), targets="ab"), TypeError, "targets: expected a list"),
        (lambda dp, trace: dp.attribute([IDS, IDS], Tokens(), targets=3), TypeError, "targets: expected a list"),
        (lambda dp, trace: dp.attribute(trace, Heads(layers=[1]))[True], TypeError, "a layer is named by its number"),
        (lambda dp, trace: dp.decompose(trace, Heads(layers="all")), ValueError, "plan\\(\\) take several layers"),
    ],
)
def test_what_is_no_argument_is_named(call, error, message):
    dp = build("llama-gqa")
    trace = dp.trace(IDS)
    with pytest.raises(error, match=message):
        call(dp, trace)


@pytest.mark.parametrize(("kind", "first"), [(Tokens(1), 1), (Heads(1), 2), (Neurons(1), 2)])
def test_plan_run_and_state_agree_on_the_first_end(kind, first):
    """The components of a head meet the MLP of their own layer before they are part of any input."""
    dp = build("llama-gqa")
    trace = dp.trace(IDS)
    for refused in (first - 1, 4):
        message = f"end: {refused} is out of range; these components reach layers {first} to 3"
        for call in (dp.plan, dp.decompose):
            with pytest.raises(ValueError, match=message):
                call(trace, kind, end=refused)
        with pytest.raises(ValueError, match=message):
            dp.carry(trace, dp.start(trace, kind), refused)
    assert dp.plan(trace, kind, end=first, measure=False).layers_passed == first - kind.entry(dp.adapter).layer
    assert dp.decompose(trace, kind, end=first).layer == first


def test_a_length_may_be_numpys():
    dp = build("llama-gqa")
    assert dp.plan(np.int64(7), Tokens(), measure=False).lengths == (7,)
