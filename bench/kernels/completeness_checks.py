"""The kernel of depass_fast.kernels.completeness against plain float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from depass_fast.kernels import completeness

from .checking import Check, error, random


def _check_missed(counts: list[int], at: list[int], positions: int, width: int, regular: bool) -> Callable:
    """Segments of ``counts`` rows, at positions ``at`` of ``positions``."""

    def run(dtype: torch.dtype, device: torch.device) -> float:
        state, x = random(0, sum(counts), width), (3 * random(1, positions, width)).to(dtype)
        sums = torch.stack([part.double().sum(0) for part in state.split(counts)])
        oracle = (sums - x.double()[at]).norm(dim=1), x.double().norm(dim=1)
        if regular:
            segments = completeness.Regular(counts[0], len(counts) // positions)
        else:
            starts = torch.tensor([0, *counts]).cumsum(0).to(device)
            segments = completeness.Jagged(starts, torch.tensor(at).to(device))
        missed, sizes = completeness.missed_norms(state.to(device), x.to(device), segments)
        here = torch.tensor(sorted(set(at)))
        return max(error(missed.norm(dim=1), oracle[0]), error(sizes.norm(dim=1)[here], oracle[1][here]))

    return run


def completeness_checks(small: bool) -> Iterator[Check]:
    """Regular segments and jagged ones; ``small``: sizes for the interpreter."""
    width = 47 if small else 1007
    yield Check("missed", "regular", _check_missed([5] * 3, [0, 1, 2], 3, width, True))
    yield Check("missed", "two of a position", _check_missed([33] * 6, [0, 0, 1, 1, 2, 2], 3, width, True))
    yield Check("missed", "jagged", _check_missed([1, 40, 16, 3], [0, 3, 4, 1], 6, width, False))
    yield Check("missed", "one row", _check_missed([1], [0], 1, 16, True))
