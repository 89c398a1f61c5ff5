"""The rules of allocation on numbers small enough to check by hand, and a user's own rule."""

import pytest
import torch

from depass_fast import Tokens
from depass_fast.allocation import RULES, Gates
from tests.support.models import build, random_ids
from tests.support.states import close


def gates(values, **changes) -> Gates:
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
        ("softmax", [0.1, 0.2, 0.0], [0.26894142, 0.73105858, 0.0]),  # exp(1) : exp(2), the exact zero left out
        ("linear", [1.0, 2.0, 4.0], [0.0, 0.25, 0.75]),
        ("linear", [3.0, 3.0, 0.0], [0.5, 0.5, 0.0]),
        ("linear", [-3.0], [1.0]),
        ("relu", [-1.0, 1.0, 3.0], [0.0, 0.25, 0.75]),
        ("relu", [-1.0, -2.0], [0.5, 0.5]),  # nobody opens the gate: evenly among those alive
        ("max", [1.0, 5.0, 5.0], [0.0, 1.0, 0.0]),
        ("max", [-1.0, -5.0, 0.0], [1.0, 0.0, 0.0]),
        ("taylor", [1.0, 2.0, 1.0], [0.25, 0.5, 0.25]),
        ("taylor", [-1.0, 2.0], [-1.0, 2.0]),
        ("taylor", [1.0, -1.0], [0.0, 0.0]),  # gate zero, activation zero
        ("softmax", [1e4, -1e4], [1.0, 0.0]),
    ],
)
def test_rules_by_hand(rule, values, expected):
    weights = RULES[rule](gates(values), 0.1)[0, :, 0]
    assert torch.allclose(weights, torch.tensor(expected, dtype=torch.float64), atol=1e-8)


@pytest.mark.parametrize("rule", ["softmax", "linear", "relu", "max"])
def test_rest_takes_what_nobody_is_eligible_for(rule):
    nobody = gates([0.0, 0.0, 0.0], rest=0)
    assert RULES[rule](nobody, 0.1)[0, :, 0].tolist() == [1.0, 0.0, 0.0]
    excluded = gates([0.0, 2.0, 0.0], rest=0, excluded=torch.tensor([[False, True, False]]))
    assert RULES[rule](excluded, 0.1)[0, :, 0].tolist() == [1.0, 0.0, 0.0]
    alive = gates([0.0, 0.0, 0.0], alive=torch.tensor([[True, False, True]]))
    assert RULES[rule](alive, 0.1)[0, :, 0].tolist() == [0.5, 0.0, 0.5]


def test_a_rule_of_ones_own_serves_all_backends():
    def even(gates, temperature):
        weights = gates.alive[..., None].expand_as(gates.values).double()
        return (weights / weights.sum(1, keepdim=True)).to(gates.values)

    dp, ids = build("llama-gqa"), random_ids(6)
    results = [dp.attribute(ids, Tokens(), allocation=even, backend=b) for b in ("reference", "torch", "triton")]
    assert close(results[1].scores, results[0].scores) and close(results[2].scores, results[0].scores)
    assert results[0].allocation == "even" and results[0].completeness_error < 1e-5
