"""The kernel of depass_fast.kernels.loudness against plain float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from depass_fast.kernels import loudness

from .checking import Check, error, poisoned, random


def _check_loudest(rows: int, positions: int, neurons: int) -> Callable:
    def run(dtype: torch.dtype, device: torch.device) -> float:
        gates, amounts = random(0, rows, neurons).to(dtype), random(1, positions, rows).abs()
        scale = random(2, positions).abs()
        oracle = gates.double().abs().amax(1) * (amounts.double() * scale.double()[:, None]).amax(0)
        wide = poisoned(rows + 2, dtype=torch.float32, device=device)
        padded = torch.nn.functional.pad(amounts, (1, 2)).to(device)[:, 1 : 1 + rows]
        loudness.loudest(gates.to(device), padded, scale.to(device), wide[1:-1])
        beside = wide[[0, -1]].isnan().all()
        return error(wide[1:-1], oracle) if beside else float("inf")

    return run


def loudness_checks(small: bool) -> Iterator[Check]:
    """Few positions and many, neurons of several blocks; ``small``: sizes for the interpreter."""
    yield Check("loudest", "one position", _check_loudest(7, 1, 21))
    yield Check("loudest", "several blocks", _check_loudest(5, 37, 300 if small else 11011))
