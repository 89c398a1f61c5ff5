"""Rounding of what a user gives becomes no component, and moves no share from one component to another."""

import pytest
import torch

from depass_fast import Custom, DePass, Subspaces
from depass_fast.components.start import settle_rounding
from tests.support.models import build, random_ids

IDS = random_ids(7)
NARROW = [torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def model():
    return build("llama-gqa")


def parts(x, *factors):
    return torch.stack([factor * x for factor in factors], dim=1)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("method", ["exact", "adjoint"])
def test_equal_components_have_equal_shares(model, dtype, method):
    trace = model.trace(IDS)
    states = parts(trace.resid(1), 0.5, 0.5)
    options = {"method": method, "temperature": 1.0}
    wanted = model.attribute(trace, Custom(1, states), 3, **options)
    result = model.attribute(trace, Custom(1, states.to(dtype)), 3, **options)
    assert result.labels == wanted.labels == ["L1.custom0", "L1.custom1"]
    torch.testing.assert_close(result.scores[0], result.scores[1], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(result.scores, wanted.scores, atol=1e-5, rtol=1e-4)
    assert result.completeness_error < 1e-5


@pytest.mark.parametrize("dtype", NARROW)
def test_a_remainder_is_spread_by_size(model, dtype):
    """Every component is off by the rounding of its own dtype, not by that of all together."""
    trace = model.trace(IDS)
    x = trace.resid(1)
    start = model.start(trace, Custom(1, parts(x, 0.01, 0.29, 0.7, 0.0).to(dtype)))
    assert start.labels == [f"L1.custom{m}" for m in range(4)]
    dense, eps = start.dense(), torch.finfo(dtype).eps
    for m, factor in enumerate((0.01, 0.29, 0.7)):
        assert ((dense[:, m] - factor * x).norm(dim=1) <= 2 * eps * factor * x.norm(dim=1) + 1e-6).all()
    assert not dense[:, 3].any()  # a component that is not there stays away
    torch.testing.assert_close(dense.sum(1), x, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("rank", [2, 5, 6, 7])
def test_a_basis_gives_the_same_in_any_dtype(model, dtype, rank):
    """Seven states span seven directions. A small complement is a component in every dtype, and none is one in none."""
    trace = model.trace(IDS)
    basis = torch.linalg.svd(trace.resid(1).double(), full_matrices=False).Vh[:rank].T
    wanted, result = (model.attribute(trace, Subspaces(1, [b]), 3) for b in (basis.float(), basis.to(dtype)))
    assert result.labels == wanted.labels == ["L1.subspace0", "rest"][: 1 + (rank < 7)]
    torch.testing.assert_close(result.scores, wanted.scores, atol=0.05, rtol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_complement_below_a_hundredth_is_one_where_another_position_has_a_larger_one(model, dtype):
    trace = model.trace(IDS)
    x = trace.resid(1).double()
    frame = torch.linalg.qr(torch.cat([x[:6].T, torch.eye(32, dtype=torch.float64)], dim=1)).Q
    tilted = torch.linalg.qr(frame[:, :6] + 0.004 * frame[:, 7:13]).Q  # all but the last state lie almost within it
    starts = [model.start(trace, Subspaces(1, [basis])) for basis in (tilted.float(), tilted.to(dtype))]
    wanted, rest = (state.dense()[:, 1] for state in starts)
    sizes = wanted.norm(dim=1) / x.norm(dim=1)
    assert sizes[:6].max() < 0.01 and sizes[:6].min() > 1e-5 and sizes[6] > 0.1
    assert (rest.norm(dim=1) > 0).all()
    assert ((rest - wanted).norm(dim=1) <= torch.finfo(dtype).eps * x.norm(dim=1)).all()


def test_nothing_to_spread_over():
    rest, named, x = torch.zeros(2, 4), torch.zeros(2, 3, 4), torch.zeros(2, 4)
    assert settle_rounding(rest, named, x, 1e-7, False)
    assert not named.any() and not rest.any()


def test_states_in_host_memory_are_settled_alike(model):
    trace = model.trace(IDS)
    kind = Custom(1, parts(trace.resid(1), 0.5, 0.25, 0.25).bfloat16())
    here, streamed = (model.attribute(trace, kind, 3, stream=stream) for stream in (False, True))
    torch.testing.assert_close(here.scores, streamed.scores, atol=1e-5, rtol=1e-4)


def test_a_model_in_half_precision(model):
    """Its states are what they are: parts of them in float32 are complete."""
    dp = DePass(build("llama-gqa", torch.bfloat16).model)
    trace = dp.trace(IDS)
    result = dp.attribute(trace, Custom(1, parts(trace.resid(1).float(), 0.5, 0.5)))
    assert result.labels == ["L1.custom0", "L1.custom1"]
    torch.testing.assert_close(result.scores[0], result.scores[1], atol=1e-3, rtol=1e-3)
