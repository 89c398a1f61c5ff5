"""Three products in float16 are as accurate as one in float32, whatever the scales of the rows."""

import numpy as np
import pytest
import torch

from bench.kernels.split_products import Split, split, split_product

ACCURACY = 3e-7


def matrix(rows: int, columns: int, seed: int, scales: tuple[float, float] = (0.0, 0.0)) -> torch.Tensor:
    """Normal numbers; rows have scales between powers of ten."""
    generator = np.random.default_rng(seed)
    tens = generator.uniform(*scales, (rows, 1)) if scales[0] < scales[1] else np.full((rows, 1), scales[0])
    return torch.from_numpy(generator.standard_normal((rows, columns)) * 10.0**tens).float()


def error(found: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> float:
    """The largest error in units of the norms of both rows."""
    x, w = x.double(), w.double()
    norms = torch.linalg.vector_norm(x, dim=1)[:, None] * torch.linalg.vector_norm(w, dim=1)
    return float(((found.double() - x @ w.T).abs() / norms).max())


def added(x: Split, w: Split) -> torch.Tensor:
    """The same three products in float64: the error of the splitting alone."""
    (xh, xl, xs), (wh, wl, ws) = ([part.double() for part in one] for one in (x, w))
    return (xh @ wl.T + xl @ wh.T + xh @ wh.T) * 2.0**-28 * xs[:, None] * ws


@pytest.mark.parametrize("columns", [63, 512, 4096])
@pytest.mark.parametrize("scales", [(0.0, 0.0), (-30.0, 30.0), (-30.0, -30.0), (30.0, 30.0)])
def test_rows_of_any_scale(columns, scales):
    x, w = matrix(33, columns, 0, scales), matrix(47, columns, 1, (-3.0, 3.0) if scales[0] < 30 else (-30.0, -20.0))
    parts = split(x), split(w)
    assert error(added(*parts), x, w) < ACCURACY
    found = split_product(*parts)
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert error(found, x, w) < ACCURACY


def test_a_single_product_of_two_numbers():
    x, w = matrix(500, 1, 0, (-15.0, 15.0)), matrix(500, 1, 1, (-15.0, 15.0))
    assert error(split_product(split(x), split(w)), x, w) < 2.0**-21


def test_scales_that_cancel_do_not_overflow_on_the_way():
    x, w = matrix(9, 64, 0, (30.0, 30.0)), matrix(7, 64, 1, (-30.0, -30.0))
    for a, b in ((x, w), (w, x)):
        assert error(split_product(split(a), split(b)), a, b) < ACCURACY


@pytest.mark.parametrize("outlier", [1e2, 1e4, 1e8])
def test_rows_with_outliers(outlier):
    """The largest number of a row takes the range of the others, which are still accurate beside it."""
    x, w = matrix(20, 300, 0), matrix(30, 300, 1)
    x[:, 7] *= outlier
    found = split_product(split(x), split(w))
    assert error(found, x, w) < ACCURACY
    assert error(found, x, w) < 3 * max(error(x @ w.T, x, w), 2e-8)


def test_the_parts_are_the_matrix():
    x = matrix(200, 100, 0, (-35.0, 38.0))
    high, low, size = split(x)
    assert high.isfinite().all() and high.abs().max() <= 2.0**15
    whole = (high.double() + low.double()) * 2.0**-14 * size.double()[:, None]
    assert ((whole - x).abs() / x.double().abs().amax(1, keepdim=True)).max() <= 2.0**-23


def test_zeros_halves_and_what_is_not_finite():
    exact = torch.tensor([[0.0, 0.0], [1.5, -2.0], [0.0, 3.0]])
    assert torch.equal(split_product(split(exact), split(exact)), exact @ exact.T)
    for wrong in (torch.nan, torch.inf):
        x = matrix(3, 8, 0)
        x[1, 2] = wrong
        found = split_product(split(x), split(matrix(4, 8, 1)))
        assert found[1].isnan().all() and found[[0, 2]].isfinite().all()


def test_parts_and_a_place_to_write_to():
    x, w, out = matrix(8, 32, 0), matrix(20, 32, 1), torch.full((8, 7), torch.nan)
    assert split_product(split(x), split(w).rows(slice(5, 12)), out) is out and error(out, x, w[5:12]) < ACCURACY
    left, right = (split_product(split(x[:, part]), split(w).columns(part)) for part in (slice(0, 9), slice(9, 32)))
    assert error(left + right, x, w) < ACCURACY
