"""The common parts of the kernels' checks: the check, its limits, layouts, and random numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from depass_fast.state.layout import Components, Layout

LIMITS = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Check:
    """A kernel, the case that the inputs cover, and the check itself: (dtype, device) -> error."""

    kernel: str
    case: str
    run: Callable[[torch.dtype, torch.device], float]


def poisoned(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An output full of NaN (7 for integers), so that a partial write cannot pass."""
    return torch.full(shape, float("nan") if dtype.is_floating_point else 7, dtype=dtype, device=device)


def error(out: Tensor, oracle: Tensor) -> float:
    """The largest difference, relative to the largest element; NaN counts as inf."""
    out, oracle = out.double().cpu(), oracle.double().cpu()
    worst = (out - oracle).abs().max() / oracle.abs().max().clamp_min(1e-30)
    return float(torch.nan_to_num(worst, nan=float("inf")))


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tokens(lengths: list[int], extras: int = 1) -> Layout:
    names = ("rest", "bias")[:extras]
    return _layout(lengths, [Components.tokens(tuple(map(str, range(n))), names, {0}) for n in lengths])


def everywhere(lengths: list[int], m: int) -> Layout:
    return _layout(lengths, [Components.everywhere(tuple(map(str, range(m))), ()) for _ in lengths])


def born(lengths: list[int], births: list[list[int]]) -> Layout:
    """Prompts whose components are born at these positions."""
    return _layout(lengths, [Components((), (), np.array(at), np.zeros(len(at), bool)) for at in births])


def _layout(lengths: list[int], components: list[Components]) -> Layout:
    return Layout.of(tuple(components), np.concatenate([[0], np.cumsum(lengths)]))


def piece_rows(layout: Layout, prompts: range, first: int, last: int | None) -> Tensor:
    """The rows of the state that a piece holds, one after the other."""
    found = []
    for segment in range(len(layout.counts)):
        if layout.prompt[segment] in prompts:
            stop = layout.counts[segment] if last is None else min(last, layout.counts[segment])
            found += range(int(layout.starts[segment]) + first, int(layout.starts[segment] + stop))
    return torch.tensor(found, dtype=torch.long)
