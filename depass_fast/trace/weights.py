"""A sample of a model's weights, by which it is seen that they have changed, however that was done.

torch counts changes in place, but not those of ``parameter.data``. A sample shows what changes a weight as a whole, or
1/512 of its rows that are neighbours. A change of fewer rows or of single elements may pass it. It then shows in the
completeness only if the weight is one whose products make up the hidden states: those of values, outputs, down
projections and norms. Nothing shows a change of queries, keys or gates.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..adapters.tuned import reparametrised

_ELEMENTS = 512  # of a weight

WeightSample = tuple[Tensor, ...]  # bytes, one tensor per device and dtype


@torch.no_grad()
def sample_weights(model: nn.Module) -> WeightSample:
    """Return a sample of every weight: elements of different rows and columns, or all of a small one.

    It is taken whenever a trace is used again, and costs a few milliseconds: what it reads lies far apart in memory.
    """
    unsteady = {id(p) for p in reparametrised(model)}  # written to in every forward pass
    parts: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in model.parameters():
        if parameter.numel() and id(parameter) not in unsteady and not parameter.is_meta:
            flat, columns = parameter.detach().reshape(-1), parameter.shape[-1] if parameter.ndim else 1
            parts.setdefault((flat.device, flat.dtype), []).append(flat[:: _step(len(flat), columns)])
    return tuple(torch.cat(part).view(torch.uint8) for part in parts.values())


def are_the_same(before: WeightSample, after: WeightSample) -> bool:
    """True if two samples of one model hold the same bytes."""
    return len(before) == len(after) and all(
        one.device == other.device and torch.equal(one, other) for one, other in zip(before, after, strict=True)
    )


def _step(elements: int, columns: int) -> int:
    """Return the step between the elements that are kept: of no common factor with the columns, to pass all of them."""
    step = max(1, elements // _ELEMENTS)
    while math.gcd(step, columns) > 1:
        step -= 1
    return step
