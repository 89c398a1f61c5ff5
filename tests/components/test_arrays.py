"""Vectors that users give, in whatever they keep them: the numbers of a decomposition are those of the vectors."""

import copy
import pickle

import numpy as np
import pytest
import torch

from depass_fast import Custom, Subspaces
from depass_fast.components.arrays import Bases
from tests.support.models import build, random_ids

IDS = random_ids(6, seed=2)
HALF = [torch.bfloat16, torch.float16]


def frame(seed: int, width: int = 32) -> torch.Tensor:
    """An orthonormal basis of all of R^width."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q


@pytest.fixture(scope="module")
def dp():
    return build("llama-gqa")


@pytest.fixture(scope="module")
def trace(dp):
    return dp.trace(IDS)


# -- Custom -----------------------------------------------------------------------------------------------------------


def test_custom_takes_what_subspaces_take(dp, trace):
    states = 0.3 * torch.randn(6, 3, 32, generator=torch.Generator().manual_seed(0))
    oracle = dp.attribute(trace, Custom(1, states, list("abc")))
    backwards = states.flip(-1).numpy()[..., ::-1]  # with negative strides
    parts = [states[:, 0].numpy(), states[:, 1], states[:, 2].double().numpy()]
    for given in (states.numpy(), states.double().numpy(), backwards, parts, tuple(parts), states.requires_grad_()):
        assert torch.equal(dp.attribute(trace, Custom(1, given, list("abc"))).scores, oracle.scores)
    kind = Custom(1, parts)
    assert torch.equal(pickle.loads(pickle.dumps(kind)).states, copy.deepcopy(kind).states)


@pytest.mark.parametrize("dtype", HALF)
def test_custom_in_half_precision_is_read_as_it_is(dp, trace, dtype):
    half = (0.3 * torch.randn(6, 3, 32, generator=torch.Generator().manual_seed(0))).to(dtype)
    oracle = dp.attribute(trace, Custom(1, half.float())).scores
    given = [half, list(half.unbind(1))] + ([half.numpy()] if dtype == torch.float16 else [])
    for states in given:
        assert torch.equal(dp.attribute(trace, Custom(1, states)).scores, oracle)


def test_bfloat16_of_numpy(dp, trace):
    dtypes = pytest.importorskip("ml_dtypes")
    states = torch.randn(6, 2, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    array = states.float().numpy().astype(dtypes.bfloat16)
    assert torch.equal(Custom(1, array).states, states)
    assert torch.equal(Bases([array[0, 0]])[0], states[0, 0, :, None])


def test_what_are_no_states(dp):
    for states, error, message in [
        (
            np.zeros((6, 2, 32), np.int64),
            TypeError,
            "states: expected a floating-point tensor .* got dtype torch.int64",
        ),
        (np.zeros((6, 2, 32), complex), TypeError, "got dtype torch.complex128"),
        (np.array([["a"]]), TypeError, "states: expected a tensor or a NumPy array of real numbers, got ndarray"),
        (np.zeros((6, 32)), ValueError, r"states: expected shape \(6, M, 32\) with M ≥ 1, got \(6, 32\)"),
        ([np.zeros((6, 32)), np.zeros((5, 32))], ValueError, r"a list of M arrays \(N, D\).*got \(6, 32\), \(5, 32\)"),
        ([np.zeros(32)], ValueError, r"a list of M arrays \(N, D\), one per component, got \(32,\)"),
        ([np.zeros((3, 32))] * 6, ValueError, r"got \(3, 6, 32\)"),  # not a position each
        ([[[0.0] * 32]] * 6, TypeError, "or a list of M arrays .6, 32., got list"),
        ([], ValueError, "got none"),
        (np.full((6, 1, 32), np.nan), ValueError, "states: holds NaN or inf"),
    ]:
        with pytest.raises(error, match=message):
            dp.attribute(IDS, Custom(1, states))


# -- Subspaces --------------------------------------------------------------------------------------------------------


def test_directions_are_bases_of_one_direction(dp, trace):
    q = frame(0)
    oracle = dp.attribute(trace, Subspaces(1, [q[:, :1], q[:, 1:2]]))
    one, other = 3.0 * q[:, 0], -q[:, 1]  # neither length nor sign matters
    for bases in (
        [one, other],
        [one.numpy(), other[:, None]],
        torch.stack([one, other]).unbind(),
        [one.tolist(), other],
    ):
        found = dp.attribute(trace, Subspaces(1, bases))
        assert found.labels == oracle.labels == ["L1.subspace0", "L1.subspace1", "rest"]
        assert torch.allclose(found.scores, oracle.scores, atol=1e-6)
    numbers = list(one.numpy()), list(other.numpy())  # NumPy's, which are arrays of their own
    assert torch.equal(Subspaces(1, numbers).bases[1], other[:, None])
    alone = dp.attribute(trace, Subspaces(1, one, ["probe"]))
    assert alone.labels == ["probe", "rest"]
    pick = np.zeros(32, dtype=np.int64)
    pick[[3, 7]] = 1
    same = [dp.attribute(trace, Subspaces(1, [x])).scores for x in (pick, torch.from_numpy(pick).double())]
    assert torch.equal(*same)


@pytest.mark.parametrize("given", [torch.zeros(32, 2), np.zeros((32, 2)), np.eye(32)])
def test_one_matrix_may_be_a_subspace_or_many_directions(given):
    with pytest.raises(TypeError, match=r"write \[basis\] for one subspace, list\(rows\) for a direction per row"):
        Subspaces(1, given)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("complete", [False, True])
def test_bases_in_half_precision_give_what_float32_gives(dp, trace, dtype, complete):
    eps = torch.finfo(dtype).eps
    for seed in range(5):
        q = frame(seed)
        bases = [q[:, :9], q[:, 9:20], q[:, 20 : 32 if complete else 30]]
        wide, half = ([one.to(d) for one in bases] for d in (torch.float32, dtype))
        oracle, found = (dp.attribute(trace, Subspaces(1, given)) for given in (wide, half))
        assert found.labels == oracle.labels and ("rest" in found.labels) == (not complete)
        assert found.completeness_error < 1e-5
        assert torch.allclose(found.scores, oracle.scores, atol=8 * eps * float(oracle.scores.abs().max()))


def test_what_half_precision_bases_miss_is_rest(dp, trace):
    """Half a hundredth of the hidden state is no rounding, whatever the bases are kept in."""
    x = trace.resid(1).double()
    x = x / x.norm(dim=1, keepdim=True)
    missed = torch.linalg.pinv(x) @ torch.full((6,), 0.005, dtype=torch.float64)
    beside = torch.linalg.svd(x).Vh[-1]  # orthogonal to every hidden state
    missed = missed + beside * (1 - missed @ missed) ** 0.5
    kept = torch.linalg.svd(missed[None]).Vh[1:].T
    assert torch.allclose(x @ missed, torch.tensor(0.005).double())
    oracle, found = (dp.attribute(trace, Subspaces(1, [kept.to(d)])) for d in (torch.float32, torch.bfloat16))
    assert found.labels == oracle.labels == ["L1.subspace0", "rest"]


@pytest.mark.parametrize("dtype", HALF)
def test_the_order_of_half_precision_bases_does_not_matter(dtype):
    q = frame(3).to(dtype)
    one, other = Bases([q[:, :5], q[:, 5:9]]).orthonormal, Bases([q[:, 5:9], q[:, :5]]).orthonormal
    for here, there in zip(one, reversed(other), strict=True):
        assert torch.allclose(here @ here.T, there @ there.T, atol=1e-13)
    together = torch.cat(one, dim=1)
    assert torch.allclose(together.T @ together, torch.eye(9, dtype=torch.float64), atol=1e-14)


def test_columns_that_differ_by_rounding_alone_are_dependent(dp):
    v = torch.randn(32, generator=torch.Generator().manual_seed(0))
    for dtype in HALF:
        with pytest.raises(
            ValueError, match=rf"bases\[0\]: its columns are linearly dependent, as far as {dtype} tells"
        ):
            dp.attribute(IDS, Subspaces(1, [torch.stack([v, 0.3 * v], 1).to(dtype)]))
    small = torch.stack([v, 1e-9 * torch.randn(32, generator=torch.Generator().manual_seed(1))], 1)
    assert dp.attribute(IDS, Subspaces(1, [small])).completeness_error < 1e-5  # small, yet another direction


def test_overlaps_beyond_rounding_are_refused(dp):
    q = frame(0)
    tilted = q[:, 1] + 0.02 * q[:, 0]
    for dtype in (torch.float32, *HALF):
        with pytest.raises(ValueError, match=r"bases\[0\] and bases\[1\] overlap \(largest cosine 0.02\)"):
            dp.attribute(IDS, Subspaces(1, [q[:, 0].to(dtype), tilted.to(dtype)]))
    with pytest.raises(ValueError, match="overlap"):  # float32 is nearer than that
        dp.attribute(IDS, Subspaces(1, [q[:, 0].float(), (q[:, 1] + 1e-3 * q[:, 0]).float()]))


def test_bases_are_those_of_the_time_when_they_were_given(dp, trace):
    basis = torch.eye(32)[:, :3].clone()
    kind = Subspaces(1, [basis])
    before = dp.attribute(trace, kind).scores
    basis.mul_(0)
    assert torch.equal(dp.attribute(trace, kind).scores, before)
    assert torch.equal(dp.attribute(trace, pickle.loads(pickle.dumps(kind))).scores, before)
    assert "<1 bases (32, 3)>" in repr(kind) or len(repr(kind)) < 200


def test_what_are_no_bases():
    for bases, message in [
        ("probe", "bases: expected a list of .* got str"),
        (None, "got NoneType"),
        ([np.zeros(32, complex)], r"bases\[0\]: expected real numbers, got dtype torch.complex128"),
        ([np.array(["a"])], r"bases\[0\]: expected a tensor or a NumPy array of real numbers, got ndarray"),
    ]:
        with pytest.raises(TypeError, match=message):
            Subspaces(1, bases)
