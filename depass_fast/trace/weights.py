"""A sample of a model's weights, by which it is seen that they have changed, however that was done.

torch counts changes in place, but not those of ``parameter.data``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..adapters.tuned import reparametrised

WeightSample = tuple[Tensor, ...]  # bytes, one tensor per device and dtype


@torch.no_grad()
def sample_weights(model: nn.Module) -> WeightSample:
    """Return a sample with an element at least of every row and every column of every weight.

    Its size is that of the longer sides together: a thousandth of a large model.
    """
    unsteady = {id(p) for p in reparametrised(model)}  # written to in every forward pass
    parts: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in model.parameters():
        if parameter.numel() and id(parameter) not in unsteady and not parameter.is_meta:
            flat = parameter.detach().reshape(-1)
            parts.setdefault((flat.device, flat.dtype), []).append(flat[:: _step(parameter.shape)])
    return tuple(torch.cat(part).view(torch.uint8) for part in parts.values())


def are_the_same(before: WeightSample, after: WeightSample) -> bool:
    """True if two samples of one model hold the same bytes."""
    return len(before) == len(after) and all(
        one.device == other.device and torch.equal(one, other) for one, other in zip(before, after, strict=True)
    )


def _step(shape: Sequence[int]) -> int:
    """Return the step between elements that passes through every row, and through every column: of no common factor."""
    if len(shape) < 2:
        return 1
    columns = shape[-1]
    step = max(1, min(math.prod(shape[:-1]), columns))
    while math.gcd(step, columns) > 1:
        step -= 1
    return step
