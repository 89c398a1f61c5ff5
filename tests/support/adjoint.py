"""Checks of the adjoint sweep's scores and estimates."""

import math

import torch

from depass_fast import Estimate


def close(approximate: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    scale = exact.abs().amax(-1, keepdim=True)
    assert ((approximate - exact).abs() / scale).max() <= tolerance


def no_nan(estimate: Estimate | None) -> bool:
    figures = [] if estimate is None else [value for value in vars(estimate).values() if isinstance(value, float)]
    return not any(map(math.isnan, figures))
