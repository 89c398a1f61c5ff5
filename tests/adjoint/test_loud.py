"""The components that are carried explicitly: those that drive a neuron alone, at any MLP ahead."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from depass_fast import Custom, DePass, Neurons
from depass_fast.adjoint.approximation import Approximation
from depass_fast.adjoint.estimate import draw_by_size, layer_error
from depass_fast.adjoint.loud import NOBODY, find_loud, loud_until
from depass_fast.adjoint.stack import LayerStack
from depass_fast.adjoint.starts import make_start
from depass_fast.options import Adjoint
from tests.support.family_models import build_model
from tests.support.models import random_ids

IDS = random_ids(6, seed=5)


@torch.no_grad()
def one_that_is_heard_later(layer: int, gate: float = 12.0) -> DePass:
    """Neuron 7 of layer 0 drives one neuron of a later layer, and is as quiet as all others before it."""
    model = build_model("llama", intermediate_size=48, num_hidden_layers=4, initializer_range=0.05)
    dp = DePass(model.double(), progress=False)
    trace = dp.trace(IDS)
    writes = dp.adapter.layer(0).mlp.down.weight[:, 7] * trace.layers[0].mlp.act[-1, 7]
    mlp = dp.adapter.layer(layer).mlp
    scale = float(mlp.scale(trace.layers[layer].mlp.resid)[-1])
    mlp.gate.module.weight[5] = 0.1 * gate * writes / (writes.square().sum() * scale * mlp.norm.weight.mean())
    return dp


def stack_and_start(dp: DePass, kind) -> tuple[LayerStack, object]:
    trace = dp.trace(IDS)
    stack = LayerStack(dp.adapter, trace, 0, len(IDS), dp.adapter.n_layers, torch.float64, torch.float64)
    return stack, make_start(kind, dp.adapter, trace, 0, len(IDS), False, torch.float64)


@pytest.mark.parametrize("layer", [1, 3])
@torch.no_grad()
def test_a_component_that_drives_one_neuron_far_ahead_is_carried_until_there(layer):
    dp = one_that_is_heard_later(layer)
    stack, start = stack_and_start(dp, Neurons(0))
    approximation = Approximation(0.1, quiet=1e-3)
    (found,) = find_loud(stack, [start], approximation, 48, 1 << 20)
    assert dict(zip(found.index.tolist(), found.until.tolist(), strict=True))[7] == layer
    (few,) = find_loud(stack, [start], approximation, 2, 1 << 20)
    assert len(few.index) + len(few.next) == 4  # out of twice as many candidates as are carried
    assert (few.gates.diff() <= 0).all() and not set(few.next.tolist()) & set(few.index.tolist())
    (again,) = loud_until(stack, [start], [torch.tensor([7])], approximation, 1)  # a row at a time
    assert again.until.tolist() == [layer]
    untouched = one_that_is_heard_later(layer, gate=0.0)
    stack, start = stack_and_start(untouched, Neurons(0))
    (others,) = find_loud(stack, [start], approximation, 48, 1 << 20)
    assert 7 not in others.index.tolist()
    assert find_loud(stack, [start], Approximation(0.1, quiet=1e9), 8, 1 << 20)[0].index.tolist() == []


def test_its_scores_are_then_right(monkeypatch):
    dp = one_that_is_heard_later(2)
    exact = dp.attribute(IDS, Neurons(0), 5).scores
    error = {}
    for loud in (3.0, 1e9):
        changed = partial(Approximation, loud=loud, quiet=1e-3)
        monkeypatch.setattr("depass_fast.methods.adjoint.Approximation", changed)
        found = dp.attribute(IDS, Neurons(0), 5, method=Adjoint(refine=0, sample=0)).scores
        error[loud] = float((found - exact)[:48].norm() / exact[:48].norm())
    assert error[3.0] < 0.01 < error[1e9]


@torch.no_grad()
def test_dense_components_are_heard_at_their_largest_position():
    dp = DePass(build_model("llama", intermediate_size=48).double(), progress=False)
    states = torch.zeros(len(IDS), 3, 32, dtype=torch.float64)
    direction = dp.adapter.layer(1).mlp.gate.module.weight[4].detach()
    states[2, 1] = direction / direction.norm()
    stack, start = stack_and_start(dp, Custom(1, states))
    (found,) = find_loud(stack, [start], Approximation(0.1), 8, 1 << 20)
    maps = stack.maps(1)
    gates = maps.gates(start.named.rows(torch.arange(3))).abs().amax((1, 2)) / 0.1
    assert gates[1] >= 2.5 and found.index.tolist() == [1]


def test_nobody():
    joined = NOBODY.joined(NOBODY)
    assert not len(joined.index) and not len(joined.until) and not len(joined.next) and not len(joined.gates)


# ----------------------------------------------------------------------------------------------- a start layer's error


def test_one_error_counts_for_itself_and_many_count_for_all():
    exact = torch.full((1, 100), float("nan"))
    scores, left = torch.ones(1, 100), torch.ones(100, dtype=torch.bool)
    exact[0, :10] = 1.0
    exact[0, 0] = 2.0  # one component of ten is off by 1
    alone = layer_error(scores, exact, left)
    assert alone == pytest.approx((1.0 / 103.0) ** 0.5, rel=1e-3)
    exact[0, :10] = 1.1  # all are off by a tenth: nine of them tell it of the others
    assert layer_error(scores, exact, left) == pytest.approx(0.09, rel=0.1)
    exact[0, :10] = 1.0
    assert layer_error(scores, exact, left) == 0.0
    assert layer_error(torch.zeros(2, 0), torch.zeros(2, 0), torch.zeros(0, dtype=torch.bool)) == 0.0


def test_components_are_drawn_by_their_scores_in_any_target():
    def drawn(scores, left, others=(), gates=(), starts=30):
        explicit = replace(NOBODY, next=torch.tensor(others, dtype=torch.long), gates=torch.tensor(gates))
        return draw_by_size(scores, left, starts, 64, explicit, torch.Generator().manual_seed(0)).tolist()

    scores = torch.zeros(2, 50)
    scores[0, 3], scores[1, 8], scores[1, 9] = 1.0, 1e-6, 1e-6
    left = torch.ones(50, dtype=torch.bool)
    assert drawn(scores, left) == [3, 8, 9]  # a target of small scores counts as much
    left[3] = False
    assert drawn(scores, left, [20], [2.0]) == [8, 9, 20]
    assert drawn(scores * 0, left, [2], [1.0], starts=1) == [2]
    scores[0] = torch.linspace(0.0, 0.1, 50)
    assert {40, 41, 42} <= set(drawn(scores, left, [5, 40, 41, 42, 6], [2.4, 2.0, 2.0, 2.0, 2.4]))  # most in danger
