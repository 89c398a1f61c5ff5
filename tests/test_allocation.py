"""The rules of allocation on numbers small enough to check by hand, and a user's own rule."""

import pytest
import torch

from depass_fast import Tokens
from depass_fast.allocation import RULES, Gates
from tests.support.models import build, random_ids
from tests.support.states import close


def gates(values, **changes) -> Gates:
    if not isinstance(values, torch.Tensor):
        values = torch.tensor(values, dtype=torch.float64)[None, :, None]
    m = values.shape[1]
    fields = {
        "values": values,
        "total": values.sum(1),
        "alive": torch.ones(1, m, dtype=torch.bool),
        "excluded": torch.zeros(1, m, dtype=torch.bool),
        "positions": torch.zeros(1, dtype=torch.long),
        "rest": None,
    }
    return Gates(**{**fields, **changes})


@pytest.mark.parametrize(
    ("rule", "values", "expected"),
    [
        ("softmax", [0.1, 0.2], [0.26894142, 0.73105858]),  # exp(1) : exp(2)
        ("softmax", [0.1, 0.1, 0.0], [0.42231880, 0.42231880, 0.15536240]),  # a zero is a gate like any other
        ("softmax", [0.0, 0.0], [0.5, 0.5]),  # a dead neuron
        ("linear", [1.0, 2.0, 4.0], [0.0, 0.25, 0.75]),
        ("linear", [3.0, 3.0, 0.0], [0.5, 0.5, 0.0]),
        ("linear", [0.0, 0.0], [0.5, 0.5]),
        ("linear", [-3.0], [1.0]),
        ("relu", [-1.0, 1.0, 3.0], [0.0, 0.25, 0.75]),
        ("relu", [-1.0, -2.0], [0.5, 0.5]),  # nobody opens the gate: evenly among those alive
        ("max", [1.0, 5.0, 5.0], [0.0, 1.0, 0.0]),
        ("max", [-1.0, -5.0, 0.0], [0.0, 0.0, 1.0]),
        ("softmax", [1e4, -1e4], [1.0, 0.0]),
    ],
)
def test_rules_by_hand(rule, values, expected):
    weights = RULES[rule](gates(values), 0.1)[0, :, 0]
    assert torch.allclose(weights, torch.tensor(expected, dtype=torch.float64), atol=1e-8)


@pytest.mark.parametrize("rule", ["softmax", "linear", "relu", "max"])
def test_rest_takes_what_nobody_is_eligible_for(rule):
    dead = torch.zeros(1, 3, dtype=torch.bool)
    nobody = gates([0.0, 0.0, 0.0], rest=0, alive=dead)
    assert RULES[rule](nobody, 0.1)[0, :, 0].tolist() == [1.0, 0.0, 0.0]
    one = torch.tensor([[False, True, False]])
    excluded = gates([0.0, 2.0, 0.0], rest=0, alive=one, excluded=one)
    assert RULES[rule](excluded, 0.1)[0, :, 0].tolist() == [1.0, 0.0, 0.0]
    away = gates([1.0, 2.0, 3.0], alive=~one, excluded=~dead)
    assert RULES[rule](away, 0.1)[0, :, 0].tolist() == [0.5, 0.0, 0.5]


@pytest.mark.parametrize("rule", ["softmax", "linear", "max"])
def test_whoever_is_alive_takes_part(rule):
    """A gate that is exactly zero says nothing: it may have been rounded. A row of zeros, however, is nobody."""
    alive = gates([0.0, 0.0, 0.0], alive=torch.tensor([[False, True, True]]))
    expected = [0.0, 1.0, 0.0] if rule == "max" else [0.0, 0.5, 0.5]
    assert RULES[rule](alive, 0.1)[0, :, 0].tolist() == expected


def test_bias_takes_part_by_its_row_or_by_a_constant():
    values = torch.zeros(1, 2, 2, dtype=torch.float64)
    values[0, 0] = torch.tensor([0.0, -0.1])
    constant = torch.tensor([0.0, -0.1], dtype=torch.float64)
    for alive, expected in ((True, [0.5, 0.26894142]), (False, [0.0, 0.26894142])):
        there = torch.tensor([[alive, True]])
        some = gates(values, alive=there, bias=0, constant=constant)
        assert torch.allclose(RULES["softmax"](some, 0.1)[0, 0], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("rule", ["softmax", "linear", "relu", "max"])
def test_a_gate_that_is_no_number_spoils_its_neuron_alone(rule):
    values = torch.tensor([[[1.0, 1.0], [float("nan"), 0.5], [-2.0, 2.0]]], dtype=torch.float64)
    weights = RULES[rule](gates(values), 0.1)[0]
    assert weights[:, 0].isnan().all() and not weights[:, 1].isnan().any()


@pytest.mark.parametrize("temperature", [1e-300, 1e-39, 1e-31, 1e-5, 1.0, 1e31, 1e39, 1e300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_temperature_gives_shares(temperature, dtype):
    there = torch.tensor([[True, True, False]])
    values = torch.tensor([[[2.0], [1.0], [9.0]]], dtype=dtype)
    weights = RULES["softmax"](gates(values, alive=there), temperature)
    expected = [1.0, 0.0, 0.0] if temperature < 1 else [0.73105858, 0.26894142, 0.0]
    expected = expected if temperature <= 1 else [0.5, 0.5, 0.0]
    assert torch.allclose(weights[0, :, 0], torch.tensor(expected, dtype=dtype))


def test_a_rule_of_ones_own_serves_all_backends():
    def even(gates, temperature):
        weights = gates.alive[..., None].expand_as(gates.values).double()
        return (weights / weights.sum(1, keepdim=True)).to(gates.values)

    dp, ids = build("llama-gqa"), random_ids(6)
    results = [dp.attribute(ids, Tokens(), allocation=even, backend=b) for b in ("reference", "torch", "triton")]
    assert close(results[1].scores, results[0].scores) and close(results[2].scores, results[0].scores)
    assert results[0].allocation == "even" and results[0].completeness_error < 1e-5
