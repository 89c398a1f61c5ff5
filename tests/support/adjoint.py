"""Comparisons of the adjoint sweep's scores with exact ones."""

import torch


def close(approximate: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    scale = exact.abs().amax(-1, keepdim=True)
    assert ((approximate - exact).abs() / scale).max() <= tolerance
