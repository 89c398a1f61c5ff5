"""Products by oneDNN are torch's, are added to what is there, and are taken where they pay."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from depass_fast.runtime import products
from depass_fast.runtime.products import accumulate, product, write_product

ROWS, K, N = 600, 96, 160
needs_one_dnn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The numbers that each call of oneDNN makes, counted; on any CPU that has it, from one multiplication on."""
    found = []
    by_one_dnn = products._by_one_dnn

    def counted(a, weight):
        found.append(a.numel() // a.shape[-1] * len(weight))
        return by_one_dnn(a, weight)

    monkeypatch.setattr(products, "one_dnn_is_faster", lambda: True)
    monkeypatch.setattr(products, "_SMALLEST", 1)
    monkeypatch.setattr(products, "_COPIED", 50 * K)
    monkeypatch.setattr(products, "_MADE", 70 * 50)
    monkeypatch.setattr(products, "_ROWS", 70)
    monkeypatch.setattr(products, "_STEP", 1)
    monkeypatch.setattr(products, "_by_one_dnn", counted)
    return found


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[0])).to(dtype)


def layouts(wide: torch.Tensor) -> dict[str, torch.Tensor]:
    """Matrices (K, N) of other layouts: a weight's transpose, its own, some of its columns, a step of its rows."""
    return {
        "weight": wide[:N, :K].contiguous().T,
        "transposed": wide[:K, :N].contiguous(),
        "columns": wide[:N, 3 : 3 + K].T,
        "step": wide[: 2 * K : 2, :N],
    }


@needs_one_dnn
@pytest.mark.parametrize("layout", ["weight", "transposed", "columns", "step"])
def test_products_are_torchs(calls, layout):
    b, a = layouts(draw(2 * K + N, K + N))[layout], draw(ROWS, K)
    exact = (a.double() @ b.double()).float()
    torch.testing.assert_close(product(a, b), exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(product(a.view(4, -1, K), b), exact.view(4, -1, N), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(product(a[1::2], b), exact[1::2], rtol=1e-4, atol=1e-4)
    assert sum(calls) == 2.5 * ROWS * N
    del calls[:]
    out = torch.full((ROWS, N), torch.nan)
    write_product(out, a, b, alpha=0.5)
    torch.testing.assert_close(out, exact / 2, rtol=1e-4, atol=1e-4)
    wide = draw(ROWS, 2 * N)
    expected = wide.clone()
    expected[:, :N] += 2 * exact
    accumulate(wide[:, :N], a, b, alpha=2.0)  # a view: its neighbours stay
    torch.testing.assert_close(wide, expected, rtol=1e-4, atol=1e-4)
    assert sum(calls) == 2 * ROWS * N and len(calls) > 2 * N // 50
    with torch.inference_mode():
        torch.testing.assert_close(product(a, b), exact, rtol=1e-4, atol=1e-4)
    assert product(a[:0], b).shape == (0, N) and product(a[0], b).shape == (N,)


@needs_one_dnn
def test_nan_and_infinity_pass(calls):
    a, b = draw(70, K), draw(K, N)
    a[3, 5], a[4, 5] = torch.nan, torch.inf
    found = product(a, b)
    assert calls and found[3].isnan().all() and torch.equal(found[4], b[5].sign() * torch.inf)
    assert found[5:].isfinite().all()


@needs_one_dnn
def test_what_is_no_product_for_one_dnn(calls):
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        a, b = draw(ROWS, K, dtype=dtype), draw(K, N, dtype=dtype)
        assert torch.equal(product(a, b), a @ b)
    a, b = draw(ROWS, K), draw(K, N).requires_grad_()
    product(a, b).sum().backward()
    torch.testing.assert_close(b.grad, a.sum(0)[:, None].expand(K, N), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert not calls and product(a, b).isfinite().all() and len(calls) == 1
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        product(a, b)
    assert counted.get_total_flops() == 2 * ROWS * K * N and len(calls) == 1
    few, columns = draw(3, K), draw(N, 2 * K)[:, :K].T  # a copy of the matrix would not pay
    assert torch.equal(product(few, columns), few @ columns) and len(calls) == 1


@needs_one_dnn
@pytest.mark.parametrize("shape", [(K + 1, N), (4, K, N), (N,)])
def test_what_is_no_product_is_torchs_error(calls, shape):
    a, b = draw(4, 7, K), draw(*shape)
    try:
        expected = a @ b
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=str(error)[:20]):
            product(a, b)
    else:
        assert torch.equal(product(a, b), expected)
    with pytest.raises(RuntimeError):
        accumulate(torch.zeros(ROWS, N), draw(ROWS, K), draw(K, 1))
    assert not calls


def test_small_products_are_torchs_own(monkeypatch):
    monkeypatch.setattr(products, "one_dnn_is_faster", lambda: True)
    monkeypatch.setattr(products, "_by_one_dnn", lambda a, weight: pytest.fail("oneDNN was called"))
    a, b = draw(8, 16), draw(16, 32)
    assert torch.equal(product(a, b), a @ b)


@pytest.mark.parametrize(
    ("vendor", "capability", "mkl", "faster"),
    [
        ("vendor_id : AuthenticAMD", "AVX512", True, True),
        ("vendor_id : GenuineIntel", "AVX512", True, False),
        ("vendor_id : AuthenticAMD", "AVX2", True, False),
        ("vendor_id : AuthenticAMD", "AVX512", False, False),
        ("", "DEFAULT", False, False),
    ],
)
def test_the_cpus_where_one_dnn_is_faster(monkeypatch, vendor, capability, mkl, faster):
    monkeypatch.setattr(products, "_vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert products.one_dnn_is_faster.__wrapped__() is faster
    assert isinstance(products.one_dnn_is_faster(), bool)


@needs_one_dnn
def test_an_attribution_by_either_library(monkeypatch):
    from depass_fast import Neurons
    from tests.support.models import build, random_ids

    monkeypatch.setattr(products, "_SMALLEST", 1)
    engine = build("llama-gqa")
    trace = engine.trace(random_ids(9))
    found = []
    for faster in (False, True):
        monkeypatch.setattr(products, "one_dnn_is_faster", lambda faster=faster: faster)
        found.append(engine.attribute(trace, Neurons(1)).scores)
        found.append(engine.attribute(trace, Neurons(layers="all"), allocation="shapley").scores)
    torch.testing.assert_close(found[0], found[2], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[1], found[3], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n", [0, 1, 63, 64, 65, 255, 256, 300, 511, 512, 700, 5000])
def test_rows_are_cut_into_pieces_of_few_sizes(n):
    pieces = list(products._heights(n, 256))
    assert [row for piece in pieces for row in range(n)[piece]] == list(range(n))
    assert all((piece.stop - piece.start) % 64 == 0 for piece in pieces[:-1]), "what is left is the last"
    assert len({piece.stop - piece.start for piece in pieces}) <= 3
