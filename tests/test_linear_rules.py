"""The linear rules: their coefficients by hand and by brute force, completeness whatever the quadrature, corners."""

import itertools
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional

from depass_fast import Custom, DePass, Heads, Modules, Neurons, Tokens, linear_rules
from depass_fast.adapters.activation import Activation
from depass_fast.linear_rules import LINEAR_RULES, linear_shares, mean_to_zero
from depass_fast.trace.record import MlpTrace
from tests.support.components import kinds
from tests.support.family_models import available, build_model, build_variant
from tests.support.forks import fork
from tests.support.models import build, random_ids
from tests.support.states import close, corner_states

SIZES = (0.0, 1e-300, 1e-30, 1e-6, 0.3, 1.0, 3.0, 8.0, 20.0, 200.0)
GATES = torch.tensor([[sign * size for size in SIZES for sign in (1, -1)]], dtype=torch.float64)
CURVES = {"silu": functional.silu, "gelu": functional.gelu, "relu": functional.relu, "sigmoid": torch.sigmoid}
INTEGRATED = CURVES | {
    "tanh-gelu": partial(functional.gelu, approximate="tanh"),
    "quick gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "mish": functional.mish,
}


def shares_of(rule, activation, gate, up=None, weight=None):
    """The coefficients at gates (P, I) and ups of an MLP that is nothing but its activation; with a router's weight."""
    act = activation(gate, up) if weight is None else activation(gate, up) * weight
    router = None if weight is None else torch.full((len(gate),), weight, dtype=gate.dtype)
    trace = MlpTrace(resid=gate, gate=gate, act=act, router_weight=router)
    weights = SimpleNamespace(
        activation=activation, up=None if up is None else object(), name="" if weight is None else "E0", inner=None
    )
    return act, linear_shares(rule, weights, trace, slice(None), gate.dtype, up)


def total(shares, gate, up):
    """The sum of what all components receive, constants included."""
    found = shares.gate * gate
    found = found if shares.up is None else found + shares.up * up
    return found if shares.constant is None else found + shares.constant


def quadrature(curve, x):
    """∫₀¹ curve(t · x) dt by 1,000 nodes on each of 64 parts of [0, 1], which halve towards zero."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(1000))
    ends = torch.cat([torch.zeros(1), 2.0 ** torch.arange(-12, 1)]).double()
    found = torch.zeros_like(x)
    for low, high in itertools.pairwise(ends):
        t = low + (high - low) * (nodes + 1) / 2
        found += (curve(t * x[..., None]) * weights).sum(-1) * (high - low) / 2
    return found


# -- the coefficients -----------------------------------------------------------------------------------------------


def test_coefficients_by_hand():
    one, two = torch.ones(1, 1).double(), torch.full((1, 1), 2.0).double()
    sigmoid = 1 / (1 + math.exp(-1))
    normal = 0.5 * (1 + math.erf(math.sqrt(0.5)))
    of_gelu = 0.5 * math.exp(-0.5) / math.sqrt(2 * math.pi) + 0.25  # ∫₀¹ of t Φ(t), where (t² - 1) Φ / 2 vanishes
    for curve, rule, gate, up in (
        ("silu", "taylor", 2 * sigmoid, None),
        ("silu", "half", sigmoid, sigmoid / 2),
        ("relu", "half", 1.0, 0.5),
        ("relu", "shapley", 1.0, 0.5),
        ("gelu", "half", normal, normal / 2),
        ("gelu", "shapley", 2 * (normal - of_gelu), of_gelu),
    ):
        _, shares = shares_of(rule, Activation(CURVES[curve]), one, two)
        assert float(shares.gate) == pytest.approx(gate, abs=1e-9), (curve, rule)
        assert shares.up is None if up is None else float(shares.up) == pytest.approx(up, abs=1e-9), (curve, rule)


@pytest.mark.parametrize(
    ("gates", "expected"),
    [([1.0, 2.0, 1.0], [0.25, 0.5, 0.25]), ([-1.0, 2.0], [-1.0, 2.0]), ([1.0, -1.0], [0.0, 0.0])],  # of all of it
)
def test_taylor_by_hand(gates, expected):
    total_gate = torch.tensor([[sum(gates)]]).double()
    act, shares = shares_of("taylor", Activation(functional.relu), total_gate, torch.full((1, 1), 4.0).double())
    assert (shares.gate * torch.tensor(gates)).flatten().tolist() == [float(act) * x for x in expected]


@pytest.mark.parametrize("rule", LINEAR_RULES)
@pytest.mark.parametrize("curve", ["silu", "gelu", "relu"])
def test_an_ungated_mlp_has_one_coefficient(curve, rule):
    """All three rules are the same there: the activation over the gate, and the slope where that is zero."""
    act, shares = shares_of(rule, Activation(CURVES[curve]), GATES)
    assert shares.up is None and shares.constant is None
    away = GATES != 0
    assert torch.equal(shares.gate[away], (act / GATES)[away])
    slope = 0.0 if rule == "taylor" else 0.5  # of each of them
    assert torch.allclose(shares.gate[~away], torch.tensor(slope).double(), atol=1e-6)


@pytest.mark.parametrize("rule", ["half", "shapley"])
@pytest.mark.parametrize("curve", CURVES)
def test_no_gate_is_too_small_or_too_large(curve, rule):
    """The coefficients are finite and complete, and near zero they are those at zero."""
    up = torch.linspace(-3, 3, GATES.shape[1]).double()[None]
    act, shares = shares_of(rule, Activation(CURVES[curve]), GATES, up)
    assert bool(shares.gate.isfinite().all() and shares.up.isfinite().all())
    assert close(total(shares, GATES, up), act, 1e-12)
    size, same = GATES.abs(), torch.ones_like(up)
    _, level = shares_of(rule, Activation(CURVES[curve]), GATES, same)
    if curve in ("silu", "gelu"):
        assert torch.allclose(level.gate[size < 1e-20], torch.tensor(0.25).double(), atol=1e-6)  # half of the slope
    narrow = shares_of(rule, Activation(CURVES[curve]), GATES.float(), up.float())[1]
    there = (GATES.float() != 0) | (GATES == 0)  # the smallest round to zero
    limit = 1e-5 if curve != "sigmoid" else 1e-3  # whose value at zero is subtracted
    assert close(narrow.gate.double()[there], shares.gate[there], limit) and close(narrow.up.double(), shares.up)


@pytest.mark.parametrize("curve", INTEGRATED)
def test_the_mean_is_that_of_a_fine_quadrature(curve, monkeypatch):
    """In float64, with float32's nodes in float64, and in float32, where all else is rounding."""
    function = INTEGRATED[curve]
    x = torch.cat([GATES, torch.linspace(-40, 40, 401).double()[None], torch.linspace(-200, 200, 81).double()[None]], 1)
    exact, small = quadrature(function, x), x.abs() <= 8
    off = (mean_to_zero(function, x) - exact).abs()
    assert float(off[small].max()) <= 1e-12 and float(off.max()) <= 1e-8
    narrow = mean_to_zero(function, x.float()).double()
    in_float32 = quadrature(function, x.float().double())
    rounding = torch.finfo(torch.float32).eps * in_float32.abs().clamp_min(1.0)
    assert bool(((narrow - in_float32).abs() <= 4 * rounding).all())
    monkeypatch.setattr(linear_rules, "_gauss", partial(nodes_of_float32, linear_rules._gauss))
    assert float((mean_to_zero(function, x) - exact).abs().max()) <= 1e-8


def nodes_of_float32(gauss, dtype, device):
    """Return where the parts end, and as many nodes and weights as in float32, without their rounding."""
    number = len(gauss(torch.float32, device)[1])
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(number))
    return gauss(dtype, device)[0], (nodes + 1) / 2, weights / 2


def test_a_gpu_evaluates_all_parts_at_once_and_finds_the_same():
    x = torch.linspace(-40, 40, 401).double()[None]
    one = linear_rules._mean_of_parts(functional.silu, x, 0)
    assert close(one, mean_to_zero(functional.silu, x), 1e-14)


def test_many_positions_are_made_a_few_at_a_time(monkeypatch):
    gate, up = torch.randn(2, 7, 5).double()
    _, once = shares_of("shapley", Activation(functional.silu), gate, up)
    monkeypatch.setattr(linear_rules, "_ON_A_CPU", (10, 3))
    _, parts = shares_of("shapley", Activation(functional.silu), gate, up)
    assert close(parts.gate, once.gate, 1e-14) and close(parts.up, once.up, 1e-14)


# -- what they are --------------------------------------------------------------------------------------------------


def test_shapley_is_the_value_of_aumann_and_shapley():
    """The gradients of three components, integrated along the way from nothing to all of them."""
    make = torch.Generator().manual_seed(0)
    g, u = (3 * torch.randn(3, 40, dtype=torch.float64, generator=make) for _ in range(2))
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(400))
    expected = torch.zeros_like(g)
    for t, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        gates, ups = ((t * x).requires_grad_() for x in (g, u))
        output = (functional.silu(gates.sum(0)) * ups.sum(0)).sum()
        of_gates, of_ups = torch.autograd.grad(output, (gates, ups))
        expected += weight * (g * of_gates + u * of_ups)
    _, shares = shares_of("shapley", Activation(functional.silu), g.sum(0)[None], u.sum(0)[None])
    assert torch.allclose(shares.gate * g + shares.up * u, expected, atol=1e-7)


def test_half_is_the_mean_of_all_to_the_gates_and_all_to_the_ups():
    make = torch.Generator().manual_seed(1)
    g, u = (torch.randn(4, 30, dtype=torch.float64, generator=make) for _ in range(2))
    act, shares = shares_of("half", Activation(functional.silu), g.sum(0)[None], u.sum(0)[None])
    expected = (act * g / g.sum(0) + act * u / u.sum(0)) / 2
    assert close(shares.gate * g + shares.up * u, expected, 1e-12)


@pytest.mark.parametrize("rule", ["half", "shapley"])
def test_a_clamped_neuron_is_shared_by_its_frozen_ratio(rule):
    """A gate above its limit, an up below minus its limit, and an offset, which is for `bias`: as gpt-oss has them."""
    curve = lambda x: x * torch.sigmoid(1.7 * x)  # noqa: E731
    gpt_oss = Activation(curve, gate_limit=7.0, up_limit=7.0, up_offset=1.0)
    gate = torch.tensor([[9.0, 9.0, -30.0, 2.0, 0.0]]).double()
    up = torch.tensor([[3.0, -12.0, 20.0, -0.5, 1.0]]).double()
    act, shares = shares_of(rule, gpt_oss, gate, up, weight=0.3)
    assert close(total(shares, gate, up), act, 1e-12)
    free = Activation(curve, up_offset=1.0)
    limited = torch.tensor([[7.0, 7.0, -30.0, 2.0, 0.0]]).double(), up.clamp(-7, 7)
    _, inside = shares_of(rule, free, *limited, weight=0.3)
    ratio = torch.tensor([[7 / 9, 7 / 9, 1, 1, 1]]), torch.tensor([[1, 7 / 12, 7 / 20, 1, 1]])
    assert close(shares.gate, inside.gate * ratio[0]) and close(shares.up, inside.up * ratio[1])
    assert torch.equal(shares.constant, inside.constant)


def test_a_routers_weight_is_in_the_coefficients():
    gate, up = torch.randn(2, 3, 8).double()
    for rule in LINEAR_RULES:
        _, whole = shares_of(rule, Activation(functional.silu), gate, up)
        _, routed = shares_of(rule, Activation(functional.silu), gate, up, weight=0.25)
        assert close(routed.gate, 0.25 * whole.gate, 1e-14)
        assert routed.up is None or close(routed.up, 0.25 * whole.up, 1e-14)


def test_a_trace_of_an_earlier_version_is_refused_for_experts():
    trace = MlpTrace(resid=torch.ones(1, 1), gate=torch.ones(1, 1), act=torch.ones(1, 1))
    weights = SimpleNamespace(activation=Activation(functional.silu), up=None, name="E0", inner=None)
    with pytest.raises(ValueError, match="trace: it was saved by an earlier version, without the router's weights"):
        linear_shares("half", weights, trace, slice(None), torch.float32)


# -- whole models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", LINEAR_RULES)
def test_the_share_of_a_sum_is_the_sum_of_the_shares(rule):
    """Nothing depends on how the residual stream is divided: two parts of a component receive what it receives."""
    dp, ids = build("llama-biases", torch.float64), random_ids(7)
    trace = dp.trace(ids)
    parts = torch.randn(7, 3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    joined = torch.stack([parts[:, 0] + parts[:, 1], 0 * parts[:, 2], parts[:, 2]], 1)
    one, other = (dp.decompose(trace, Custom(1, x), allocation=rule).dense() for x in (parts, joined))
    assert close(one[:, :2].sum(1), other[:, 0], 1e-12) and close(one[:, 2:], other[:, 2:], 1e-12)
    assert not other[:, 1].any()


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
@pytest.mark.parametrize("rule", LINEAR_RULES)
def test_equals_share_alike_and_the_absent_receive_nothing(rule, backend):
    dp, ids = build("llama-gqa"), random_ids(6)
    trace = dp.trace(ids)
    states = corner_states(trace)
    states[:, 4] = states[:, 0]
    out = dp.decompose(trace, Custom(1, states), allocation=rule, backend=backend).dense()
    assert torch.equal(out[:, 4], out[:, 0]) and not out[:3, 1].any()
    assert close(out[3:, 2], -out[3:, 1])


@pytest.mark.parametrize("rule", LINEAR_RULES)
def test_nobody_is_left_out(rule):
    dp, ids = build("llama-gqa"), random_ids(6)
    some, none, every = (
        dp.attribute(ids, Tokens(), allocation=rule, method="exact", exclude_special=x)
        for x in (True, False, [0, 1, 2])
    )
    assert torch.equal(some.scores, none.scores) and torch.equal(every.scores, none.scores)


@pytest.mark.parametrize("kind", [Tokens(), Neurons(0), Heads(1), Modules(0)])
def test_shapley_is_complete_whatever_the_quadrature_gives(kind, monkeypatch):
    dp, ids = build("llama-biases", torch.float64), random_ids(7)
    right = dp.attribute(ids, kind, [5], allocation="shapley", method="exact")
    monkeypatch.setattr(linear_rules, "mean_to_zero", lambda curve, x: 0.3 * torch.sin(x))
    wrong = dp.attribute(ids, kind, [5], allocation="shapley", method="exact")
    assert wrong.completeness_error < 1e-12 and wrong.layer_errors.max() < 1e-12
    assert not close(wrong.scores, right.scores, 1e-3)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"mlp_bias": True, "attention_bias": True}),  # of the gate, of the up projection, of down
        ("llama", {"hidden_act": "sigmoid"}),  # an activation that does not vanish at zero
        ("gpt2", {"activation_function": "sigmoid"}),  # norms with biases; ungated
        ("gpt_neox", {}),
    ],
)
@pytest.mark.parametrize("rule", ["half", "shapley"])
def test_constants_are_shares_of_bias(name, changes, rule):
    dp, ids = DePass(build_model(name, **changes).double()), random_ids(5)
    trace = dp.trace(ids)
    appears = name != "llama" or "mlp_bias" in changes or rule == "half"
    for kind in (Tokens(), Heads(0)):
        oracle = dp.decompose(trace, kind, allocation=rule, backend="reference")
        assert ("bias" in oracle.labels) == appears
        assert close(oracle.dense().sum(1), trace.normed_final, 1e-12)
        for options in ({}, {"memory_budget": 2_000}, {"stream": True, "memory_budget": 2_000}):
            assert close(dp.decompose(trace, kind, allocation=rule, **options).dense(), oracle.dense(), 1e-11)
    result = dp.attribute(trace, Tokens(), allocation=rule, method="exact")
    assert result.completeness_error < 1e-12 and ("bias" in result.labels) == appears
    softmax = dp.attribute(trace, Tokens())
    assert ("bias" in softmax.labels) == (name != "llama" or "mlp_bias" in changes)


@pytest.mark.parametrize("rule", ["half", "shapley"])
def test_clamps_of_a_model_that_has_them(rule):
    if not available("gpt_oss"):
        pytest.skip("the installed transformers does not have gpt_oss")
    model = build_variant("gpt_oss").double()
    for layer in model.model.layers:
        layer.mlp.experts.limit = 0.4
    dp, ids = DePass(model), random_ids(8)
    trace = dp.trace(ids)
    assert any(bool((part.gate > 0.4).any()) for layer in trace.layers for part in layer.mlps)
    for kind in (Tokens(), Neurons(0)):
        oracle = dp.decompose(trace, kind, allocation=rule, backend="reference").dense()
        assert close(oracle.sum(1), trace.normed_final, 1e-12)
        assert close(dp.decompose(trace, kind, allocation=rule).dense(), oracle, 1e-11)


@pytest.mark.parametrize("rule", LINEAR_RULES)
def test_every_way_of_asking(rule):
    """Checked as it goes, in steps, in parts, a few chosen ones, joined layers, and a tiny workspace."""
    dp, ids = build("llama-biases"), random_ids(6)
    trace = dp.trace(ids)
    checked = dp.attribute(trace, Tokens(), 5, allocation=rule, method="exact", verify=True)
    assert checked.verification.passed and checked.verification.error < 1e-5
    for label, kind in kinds(len(ids)).items():
        whole = dp.decompose(trace, kind, allocation=rule)
        assert close(dp.decompose(trace, kind, allocation=rule, memory_budget=1).dense(), whole.dense()), label
        state = dp.start(trace, kind, allocation=rule)
        for stop in [*range(state.layer + 1, 4), None]:
            state = dp.carry(trace, state, stop, allocation=rule)
        assert close(state.dense(), whole.dense()), label
        partition = dp.partition(trace, kind, allocation=rule)
        chosen = [whole.labels[-1], whole.labels[0]]
        focus = dp.focus(trace, kind, chosen, partition=partition, allocation=rule)
        entering = dp.decompose(trace, kind, end=3, allocation=rule)
        where = [entering.labels.index(label) for label in chosen]
        assert close(focus.entering(3), entering.dense()[:, where]), label
    for one, alone in zip(
        dp.attribute(trace, Heads(layers="all"), 5, allocation=rule, method="exact"), range(3), strict=True
    ):
        assert close(one.scores, dp.attribute(trace, Heads(alone), 5, allocation=rule, method="exact").scores)
    prompts = [random_ids(n, seed=n) for n in (5, 1, 6)]
    for ids, one in zip(prompts, dp.attribute(prompts, Neurons(1), 5, allocation=rule, method="exact"), strict=True):
        assert close(one.scores, dp.attribute(ids, Neurons(1), 5, allocation=rule, method="exact").scores)


def test_a_fork_without_an_activation_is_refused_before_any_work(monkeypatch):
    model = fork()
    for layer in model.model.layers:
        del layer.mlp.act_fn
        layer.mlp.forward = lambda x, mlp=layer.mlp: mlp.down_proj(functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    dp, ids = DePass(model), random_ids(5)
    assert dp.attribute(ids, Tokens(), allocation="taylor", method="exact").completeness_error < 1e-5
    monkeypatch.setattr(model, "forward", None)
    for rule in ("half", "shapley"):
        for ask in (dp.attribute, dp.decompose):
            with pytest.raises(ValueError, match=f"allocation: '{rule}' needs the up projection and the activation"):
                ask(ids, Tokens(), allocation=rule)
