"""Who takes part in the allocation: whoever is alive, in every backend, however small a gate is and however rounded."""

import pytest
import torch

from depass_fast import Custom, DePass, Neurons
from depass_fast.backends.torch import mlp
from tests.support.family_models import build_model
from tests.support.models import FAMILIES, build, random_ids
from tests.support.states import close

ALL = ("reference", "torch", "stream", "triton")
RULES = ("softmax", "linear", "relu", "max")


def chosen(backend: str) -> dict:
    return {"stream": True} if backend == "stream" else {"backend": backend}


def some_states(scale: float, n: int = 6, m: int = 9) -> torch.Tensor:
    return scale * torch.randn(n, m, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("dtype", "limit"), [("float16", 4e-3), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("scale", [1.0, 1e-5, 1e-7, 1e-8])
def test_small_components_keep_their_shares_in_half_precision(scale, dtype, limit, backend):
    """Most gates of the smallest are below what float16 holds."""
    ids, states = random_ids(6), some_states(scale)
    exact = build("llama-gqa", torch.float64).attribute(ids, Custom(0, states), 5, backend="reference").scores[:9]
    found = build("llama-gqa").attribute(ids, Custom(0, states.float()), 5, backend=backend, compute_dtype=dtype)
    assert (found.scores[:9] - exact).abs().max() <= limit * exact.abs().max()


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("rule", RULES)
def test_a_gate_that_rounds_to_zero_is_one_like_any_other(rule, backend):
    """One component's gates are below float32's range: all backends agree with one another and with float64."""
    states, ids = some_states(0.5), random_ids(6)
    states[:, 4] = 1e-42
    exact, found = (
        dp.attribute(ids, Custom(0, states.to(dtype)), 5, allocation=rule, temperature=0.97, **how).scores
        for dp, dtype, how in (
            (build("llama-gqa", torch.float64), torch.float64, {"backend": "reference"}),
            (build("llama-gqa"), torch.float32, chosen(backend)),
        )
    )
    assert close(found.double(), exact, 2e-5)


@pytest.mark.parametrize("backend", ALL[1:])
@pytest.mark.parametrize("rule", RULES)
def test_a_dead_neuron_is_shared_by_those_alive(rule, backend):
    """No activation gives a neuron that nobody drives anything to share, so that one is put into the trace."""
    dp, ids = DePass(build_model("llama")), random_ids(6)
    with torch.no_grad():
        dp.adapter.layer(1).mlp.gate.module.weight[3] = 0.0
    trace, states = dp.trace(ids), some_states(0.5).float()
    states[2:4, 5] = 0.0
    trace.layers[1].mlps[0].act[:, 3] = 2.0
    kind = Custom(1, states, site="resid_mid")
    exact = dp.decompose(trace, kind, end=2, allocation=rule, backend="reference").dense()
    assert close(dp.decompose(trace, kind, end=2, allocation=rule, **chosen(backend)).dense(), exact)


@pytest.mark.parametrize("backend", ALL[1:])
@pytest.mark.parametrize("rule", RULES)
def test_bias_without_a_state_is_driven_by_constants_alone(rule, backend):
    """At the first MLP `bias` is a row of zeros; it takes part in the neurons whose gate has a bias."""
    model_type, changes = FAMILIES["llama-biases"]
    dp, ids = DePass(build_model(model_type, **changes)), random_ids(6)
    with torch.no_grad():
        dp.adapter.layer(1).mlp.gate.module.bias[::2] = 0.0
    trace, kind = dp.trace(ids), Custom(1, some_states(0.5).float(), site="resid_mid")
    exact = dp.decompose(trace, kind, end=2, allocation=rule, backend="reference").dense()
    for budget in (2_000, None):
        found = dp.decompose(trace, kind, end=2, allocation=rule, memory_budget=budget, **chosen(backend)).dense()
        assert close(found, exact)


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("rule", RULES)
def test_a_gate_that_is_no_number_spoils_its_neuron(rule, backend):
    """Every share of the neuron is NaN, and so is every component's state behind it; other positions are not."""
    dp, ids = build("llama-gqa"), random_ids(6)
    trace = dp.trace(ids)
    kind = Custom(1, some_states(0.5).float(), site="resid_mid")
    state = dp.start(trace, kind)
    spoiled = int(state.layout.starts[2]) + 3
    state.rows[spoiled, 0] = float("nan")
    found = dp.carry(trace, state, end=2, allocation=rule, **chosen(backend)).dense()
    assert found[2].isnan().all() and not found[[0, 1, 3, 4, 5]].isnan().any()


@pytest.mark.parametrize("backend", ALL)
@pytest.mark.parametrize("temperature", [1e-39, 1e-31, 1e-10, 1e31])
def test_any_temperature_agrees_with_the_winner_or_an_even_split(temperature, backend):
    dp, ids = build("llama-gqa"), random_ids(6)
    trace, kind = dp.trace(ids), Custom(1, some_states(0.5).float())
    how = chosen(backend)
    found = dp.decompose(trace, kind, end=2, temperature=temperature, **how).dense()
    if temperature < 1:
        expected = dp.decompose(trace, kind, end=2, allocation="max", **how).dense()
    else:
        expected = dp.decompose(trace, kind, end=2, temperature=1e6, **how).dense()
    assert close(found, expected)
    assert close(found.sum(1), trace.resid(2))


def test_zeros_are_looked_for_in_one_column(monkeypatch):
    """Neither gates nor weights are searched for zeros, which took 5 % of the time."""
    seen = []
    ordinary = mlp.has_zeros
    monkeypatch.setattr(mlp, "has_zeros", lambda x: seen.append(x.ndim) or ordinary(x))
    build("llama-gqa").attribute(random_ids(6), Neurons(0), 5, backend="torch")
    assert set(seen) == {1}
