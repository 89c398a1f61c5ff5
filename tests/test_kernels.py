"""Every kernel in Triton's interpreter against float64: odd sizes, corners, outputs poisoned with NaN."""

import pytest
import torch

from bench.kernel_checks import LIMITS, checks

CHECKS = list(checks(small=True))


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("check", CHECKS, ids=[f"{c.kernel}: {c.case}" for c in CHECKS])
def test_a_kernel_agrees_with_float64(check, dtype):
    assert check.run(dtype, torch.device("cpu")) <= LIMITS[dtype]
