"""A sample of a model's weights, by which it is seen that they have changed, however that was done.

torch counts changes in place, but not those of ``parameter.data``. A sample shows what changes a weight as a whole, or
1/512 of its rows that are neighbours. A change of fewer rows or of single elements may pass it. It then shows in the
completeness only if the weight is one whose products make up the hidden states: those of values, outputs, down
projections and norms. Nothing shows a change of queries, keys, gates or up projections.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..adapters.tuned import parameters_of, reparametrised

_ELEMENTS = 512  # of a weight

WeightSample = tuple[Tensor, ...]  # bytes, one tensor per device and dtype


@torch.no_grad()
def sample_weights(model: nn.Module) -> WeightSample:
    """Return a sample of every weight: elements of different rows and columns, or all of a small one.

    It is taken whenever a trace is used again, and costs a few milliseconds: what it reads lies far apart in memory.
    """
    unsteady = {id(p) for p in reparametrised(model)}  # written to in every forward pass
    parts: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    steady = (p for p in parameters_of(model) if id(p) not in unsteady)
    for held in (tensor for parameter in steady for tensor in plain_tensors(parameter)):
        if held.numel() and not held.is_meta:
            flat, columns = held.reshape(-1), held.shape[-1] if held.ndim else 1
            parts.setdefault((flat.device, flat.dtype), []).append(flat[:: _step(len(flat), columns)])
    return tuple(torch.cat(part).view(torch.uint8) for part in parts.values())


def plain_tensors(value: Tensor) -> Iterator[Tensor]:
    """A weight, without its graph; of one that is quantised as a tensor of tensors, those that it is made of."""
    if not hasattr(value, "__tensor_flatten__"):
        yield value.detach().as_subclass(Tensor)
        return
    names, _ = value.__tensor_flatten__()  # pyright: ignore[reportAttributeAccessIssue]
    for name in names:
        yield from plain_tensors(getattr(value, name))


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
