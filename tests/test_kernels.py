"""Every kernel in Triton's interpreter against float64: odd sizes, corners, outputs poisoned with NaN."""

import pytest
import torch

from bench.kernel_checks import LIMITS, checks
from depass_fast.kernels import allocation, attention, gemm, rows

CHECKS = list(checks(small=True))


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("check", CHECKS, ids=[f"{c.kernel}: {c.case}" for c in CHECKS])
def test_a_kernel_agrees_with_float64(check, dtype):
    assert check.run(dtype, torch.device("cpu")) <= LIMITS[dtype]


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("name", ["tokens", "many tiles, window"])
def test_components_may_be_mixed_one_or_two_at_a_time(name, columns, monkeypatch):
    """As on a GPU; the interpreter takes more."""
    ordinary = attention.mix_config
    monkeypatch.setattr(attention, "mix_config", lambda *arguments: ordinary(*arguments) | {"BM": columns})
    check = next(check for check in CHECKS if (check.kernel, check.case) == ("mix", name))
    assert check.run(torch.float16, torch.device("cpu")) <= LIMITS[torch.float16]


FAR = 2**31 + 5  # elements in front of what is looked at


def far(*shape: int, rows_before: int) -> torch.Tensor:
    """A tensor behind so many rows that 32 bits do not count its elements; its memory is never touched, but for it."""
    before = torch.empty((rows_before + shape[0], *shape[1:]), dtype=torch.float16)
    assert before.numel() > 2**31
    return before


def test_offsets_beyond_32_bits_in_the_allocation():
    """Gates that lie behind 2³¹ others become what the same gates become at the beginning."""
    width, count = 1 << 16, 3
    skipped = FAR // width + 1
    gates = far(count, width, rows_before=skipped)
    near = torch.randn(count, 8, generator=torch.Generator().manual_seed(0)).half()
    gates[skipped:, :8] = near
    act, alive = torch.ones(1, 8).half(), torch.ones(count, dtype=torch.uint8)

    def shares(g: torch.Tensor, first: int) -> None:
        starts = torch.tensor([first, first + count])
        where = allocation.Segments(starts, torch.tensor([0]), count)
        allocation.allocate(g, where, act, act, "softmax", 0.1, alive)

    shares(gates[:, :8], skipped)
    shares(near, 0)
    assert torch.equal(gates[skipped:, :8], near)
    assert torch.allclose(near.float().sum(0), torch.ones(8), atol=2e-3)


def test_offsets_beyond_32_bits_in_rows():
    width = 1 << 16
    skipped = FAR // width + 1
    state = far(2, width, rows_before=skipped)
    state[skipped:] = torch.randn(2, width, generator=torch.Generator().manual_seed(1)).half()
    expected = state[skipped:].float()
    base, source = torch.tensor([0, 2]), torch.tensor([skipped])
    where = rows.Rows(torch.zeros(2, dtype=torch.int32), base, source)
    out = rows.read_rows(state, where, torch.tensor([2.0]), None, False, torch.empty(2, width))
    assert torch.equal(out, 2 * expected)
    rows.add_rows(state, where, expected)
    assert torch.allclose(state[skipped:].float(), 2 * expected, rtol=2e-3)
