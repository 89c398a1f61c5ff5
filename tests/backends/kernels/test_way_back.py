"""The kernel of the way back through neurons, in Triton's interpreter, against the rules in float64."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from depass_fast import DePass, Heads, Neurons, Tokens
from depass_fast.kernels import way_back
from depass_fast.kernels.way_back import CURVES, RULES, neurons_back
from depass_fast.ledger import curves, norms
from depass_fast.linear_rules import mean_to_zero
from tests.support.family_models import VARIANTS, available, build_variant
from tests.support.models import random_ids

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


KERNEL = {"phi3": True, "mixtral": True, "gemma2": True, "gpt_oss": False, "gpt2": False}
AGAIN = [
    pytest.param(name, marks=pytest.mark.thorough) if name in ("phi3", "mixtral", "gpt_oss") else name
    for name in KERNEL
]


@pytest.mark.parametrize("name", AGAIN)
def test_a_ledger_by_the_kernel_is_the_plain_one(name, monkeypatch):
    """Biases and clamps are left to the plain code; one prompt is longer than a piece."""
    if not available(name):
        pytest.skip("not in this version of transformers")
    dp = DePass(build_variant(name), progress=False)
    prompts, kinds = (
        [random_ids(6), random_ids(1), random_ids(20, 1)],
        (Tokens(), Heads(layers="all"), Neurons(layers="all")),
    )
    calls, inner = [], way_back.neurons_back
    monkeypatch.setattr(way_back, "neurons_back", lambda *given: calls.append(1) or inner(*given))
    plain = dp.ledger(prompts, [5, 3], position=[0, -1])
    for module in (curves, norms):
        monkeypatch.setattr(module, "has_kernels", lambda device, *dtypes: torch.float64 not in dtypes)
    monkeypatch.setattr("depass_fast.ledger.batches._PIECE", 16)
    found = dp.ledger(prompts, [5, 3], position=[0, -1])
    assert bool(calls) == KERNEL[name]
    for kind in kinds:
        for ours, theirs in zip(every(found.scores(kind)), every(plain.scores(kind)), strict=True):
            assert ours.labels == theirs.labels and ours.completeness_error < 1e-4
            assert torch.allclose(ours.scores, theirs.scores, atol=3e-6 * float(theirs.scores.abs().max()), rtol=0)
    mixed = DePass(dp.model, compute_dtype="float64", progress=False).ledger(prompts, 5)
    assert mixed.completeness_error < 1e-5  # which the kernel does not take


def every(answer):
    """The attributions in an answer of a ledger."""
    if isinstance(answer, list):
        return [one for part in answer for one in every(part)]
    return list(answer) if hasattr(answer, "by_layer") else [answer]


def test_the_kernel_knows_the_activations_of_the_families():
    """By their names; each name's formula is the activation."""
    x, known = torch.linspace(-9, 9, 301), set()
    for name in VARIANTS:
        if not available(name):
            continue
        adapter = DePass(build_variant(name)).adapter
        first = next((index for index in range(adapter.n_layers) if adapter.has_mlp(index)), None)
        if first is None:
            continue
        curve = adapter.mlps(first)[0].activation.curve
        found = curves.curve_name(curve)
        if found is not None:
            known.add(found)
            assert torch.allclose(curve(x), FUNCTIONS[found](x), atol=2e-6), name
    assert known == {"silu", "gelu", "gelu_tanh", "relu"}
