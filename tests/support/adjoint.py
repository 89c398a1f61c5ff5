"""Checks of the adjoint sweep's scores and estimates."""

import math
from dataclasses import replace

import torch

from depass_fast import Estimate
from depass_fast.adjoint.loud import NOBODY, Loud


def assert_close(approximate: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    """Assert that scores (..., M) are close, relative to the largest of each row."""
    scale = exact.abs().amax(-1, keepdim=True)
    assert ((approximate - exact).abs() / scale).max() <= tolerance


def explicit_rows(index: torch.Tensor) -> Loud:
    """Return components (k,) to be carried; none of them is loud anywhere."""
    return replace(NOBODY, index=index, until=torch.full_like(index, -1))


def no_nan(estimate: Estimate | None) -> bool:
    """True if no figure of an estimate is NaN; None is a figure that was not measured."""
    figures = [] if estimate is None else [value for value in vars(estimate).values() if isinstance(value, float)]
    if estimate is not None:
        figures += (estimate.layer_errors or {}).values()
    return not any(map(math.isnan, figures))
