"""Several positions in one call: what single calls give, of one decomposition."""

import numpy as np
import pytest
import torch

from depass_fast import Adjoint, Heads, Neurons, Tokens
from tests.support.components import Dictionary, kinds
from tests.support.models import build, random_ids

IDS, WANTED = random_ids(9), [3, 7, -1, 3]
MODELS = ["llama-gqa", "qwen2", "mistral-window"]


def same(found, alone, within=1e-5):
    """The same scores by label, of everything that either result names."""
    ours, theirs = (dict(zip(one.labels, one.scores_of(0).tolist(), strict=True)) for one in (found, alone))
    largest = max(1.0, *map(abs, theirs.values()))
    return all(abs(ours.get(label, 0.0) - theirs.get(label, 0.0)) <= within * largest for label in {*ours, *theirs})


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", kinds(9))
def test_positions_equal_single_calls(name, kind):
    dp = build(name)
    trace, components = dp.trace(IDS), kinds(9)[kind]
    found = dp.attribute(trace, components, position=WANTED)
    assert [one.position for one in found] == [3, 7, 8, 3]
    for one, position in zip(found, WANTED, strict=True):
        alone = dp.attribute(trace, components, position=position)
        assert same(one, alone) and one.target_ids == alone.target_ids and one.completeness_error < 1e-5
        assert abs(float(one.scores.sum() - one.target_logits)) < 1e-4


@pytest.mark.parametrize(
    "options",
    [{"backend": "reference"}, {"backend": "triton"}, {"stream": True, "memory_budget": 3000}, {"verify": True}],
)
def test_positions_of_a_batch_whatever_carries_them(options):
    dp, prompts = build("qwen2"), [IDS, IDS[:4]]
    for kind in (Tokens(), Neurons(1)):
        found = dp.attribute(prompts, kind, targets=[5, [6, 7]], position=[1, -1], **options)
        assert [[one.position for one in of_prompt] for of_prompt in found] == [[1, 8], [1, 3]]
        assert found[0][0].scores.ndim == 1 and len(found[1][0].scores) == 2
        for at, position in enumerate([1, -1]):
            alone = dp.attribute(prompts, kind, targets=[5, [6, 7]], position=position)
            assert all(same(of_prompt[at], one) for of_prompt, one in zip(found, alone, strict=True))
            if "verify" in options:
                assert all(of_prompt[at].verification.passed for of_prompt in found)


@pytest.mark.parametrize("options", [{}, {"stream": True}, {"method": "adjoint", "allocation": "taylor"}])
def test_positions_of_all_layers(options):
    """An adjoint sweep is one per position."""
    dp, kind = build("qwen2"), Neurons(layers="all")
    found = dp.attribute([IDS, IDS[:4]], kind, position=[2, 3], **options)
    assert [[one.position for one in of_prompt] for of_prompt in found] == [[2, 3], [2, 3]]
    for at, position in enumerate([2, 3]):
        for ours, alone in zip(found, dp.attribute([IDS, IDS[:4]], kind, position=position, **options), strict=True):
            assert ours[at].method == alone.method and ours[at].layers == alone.layers
            assert all(same(one, other) for one, other in zip(ours[at], alone, strict=True))


def test_positions_at_the_input_of_a_layer_and_of_features():
    dp, vector = build("llama-gqa"), torch.randn(32, generator=torch.Generator().manual_seed(0))
    found = dp.attribute(IDS, Tokens(), vector, end=2, position=np.array([0, 5]))
    whole = dp.decompose(IDS, Tokens(), end=2).dense()
    for one in found:
        assert torch.allclose(one.scores, whole[one.position] @ vector, atol=1e-4)
    kind = kinds(9)["features@1"]
    assert isinstance(kind.sae, Dictionary)
    sweep = Adjoint(refine=500, sample=0)
    for one, exact in zip(
        dp.attribute(IDS, kind, position=[4, 8], method=sweep), dp.attribute(IDS, kind, position=[4, 8]), strict=True
    ):
        assert one.method == "adjoint" and same(one, exact, within=5e-2)


def test_a_list_of_one_position_gives_a_list():
    dp = build("llama-gqa")
    (one,) = dp.attribute(IDS, Heads(1), position=torch.tensor([4]))
    assert torch.allclose(one.scores, dp.attribute(IDS, Heads(1), position=4).scores)
    ((one,), _) = dp.attribute([IDS, IDS], Heads(1), position=(4,))
    assert one.position == 4


def test_positions_are_one_forward_pass_and_one_way_through_the_layers(monkeypatch):
    dp, calls = build("llama-gqa"), []
    backend = type(dp.options.build(dp.adapter).backend)
    mlp, forward = backend.allocate_mlp, dp.model.model.forward
    monkeypatch.setattr(backend, "allocate_mlp", lambda *a, **k: calls.append("mlp") or mlp(*a, **k))
    monkeypatch.setattr(dp.model.model, "forward", lambda *a, **k: calls.append("forward") or forward(*a, **k))
    dp.attribute(IDS, Tokens())  # a model's first call takes another forward pass, to check it
    calls.clear()
    dp.attribute(IDS, Tokens(), position=list(range(9)))
    dp.attribute(IDS[:4], Tokens(), continuation=IDS[4:])
    assert calls == ["forward", "mlp", "mlp", "mlp"] * 2


@pytest.mark.parametrize(
    ("position", "error", "message"),
    [
        ([], ValueError, "position: empty"),
        ([0, 9], ValueError, "position: 9 is out of range for a prompt of 9 tokens"),
        ([0, 1.5], TypeError, "position: expected an integer, or a list of integers, got 1.5"),
        ("3,8", TypeError, "position: expected an integer, or a list of integers, got '3,8'"),
        ({1, 2}, TypeError, "position: expected an integer, or a list of integers, got {1, 2}"),
        (None, TypeError, "position: expected an integer, or a list of integers, got None"),
        ([True], TypeError, "position: expected an integer, or a list of integers, got True"),
    ],
)
def test_bad_positions_are_refused_before_any_work(position, error, message, monkeypatch):
    dp = build("llama-gqa")
    monkeypatch.setattr(dp.model, "forward", lambda *args, **kwargs: pytest.fail("work was done"))
    with pytest.raises(error, match=message):
        dp.attribute(IDS, Tokens(), position=position)
