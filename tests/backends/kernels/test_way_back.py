"""The kernel of the way back through neurons, in Triton's interpreter, against the rules in float64."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from depass_fast.kernels.way_back import CURVES, RULES, neurons_back
from depass_fast.linear_rules import mean_to_zero

FUNCTIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu}
ROWS, POSITIONS, NEURONS, RECORDED = 2, 21, 40, 30
ENDS = torch.tensor([0, 5, 21], dtype=torch.int32)


def given(curve, gated, routed, dtype):
    """Gradients, and the trace of an MLP with gates that are zero, large and very large."""
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    gate, at = 5 * draw(RECORDED, NEURONS), torch.randperm(RECORDED, generator=generator)[:POSITIONS]
    gate[at[0], 0], gate[at[1], 3], gate[at[2], 4] = 0.0, 60.0, -90.0
    gate, up = gate.to(dtype), draw(POSITIONS, NEURONS).to(dtype) if gated else None
    router = torch.rand(RECORDED, generator=generator) if routed else None
    act = torch.zeros(RECORDED, NEURONS)
    act[at] = FUNCTIONS[curve](gate[at].float()) * (1.0 if up is None else up.float())
    act = act if router is None else act * router[:, None]
    return draw(ROWS, POSITIONS, NEURONS).to(dtype), act.to(dtype), gate, up, at, router


def expected(y, act, gate, up, at, router, rule, curve):
    """The gradients of gates and ups, and the scores, by the rules' formulas in float64."""
    y, a, g = y.double(), act[at].double(), gate[at].double()
    weight = 1.0 if router is None else router[at, None].double()
    of_up, driven, limit = None, a, torch.full_like(a, 0.5) * weight
    if up is not None:
        half = rule == "half"
        of_up = weight * (0.5 * FUNCTIONS[curve](g) if half else mean_to_zero(FUNCTIONS[curve], g))
        driven, limit = a - of_up * up.double(), 0.25 * weight * up.double()
    of_gate = torch.where(g == 0, limit, driven / torch.where(g == 0, 1.0, g))
    scores = torch.stack([(y * a)[:, first:last].sum(1) for first, last in pairwise(ENDS.tolist())], 1)
    return y * of_gate, None if of_up is None else y * of_up, scores


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("curve", CURVES)
def test_it_agrees_with_the_rules(curve, rule, gated):
    for dtype, routed in ((torch.float32, False), (torch.bfloat16, True)):
        y, act, gate, up, at, router = given(curve, gated, routed, dtype)
        wanted = expected(y, act, gate, up, at, router, rule, curve)
        of_up, scores = neurons_back(y, act, gate, up, at, ENDS, rule, curve, router)
        limit = 2e-6 if dtype == torch.float32 else 1e-2
        for found, right in zip((y, of_up, scores), wanted, strict=True):
            assert (found is None) == (right is None)
            if found is not None:
                assert float((found - right).norm() / right.norm()) <= limit


def test_bad_arguments_are_refused():
    y, act, gate, up, at, _ = given("silu", True, False, torch.float32)
    with pytest.raises(ValueError, match="rule, curve"):
        neurons_back(y, act, gate, up, at, ENDS, "taylor", "silu")
    with pytest.raises(ValueError, match="recorded"):
        neurons_back(y, act, gate, up, at.int(), ENDS, "half", "silu")
    with pytest.raises(ValueError, match="up"):
        neurons_back(y, act, gate, up[:3], at, ENDS, "half", "silu")
