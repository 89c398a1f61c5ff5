"""The components that are too loud for a first order: any that drives a neuron alone (docs/adjoint.md, 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from ..runtime.transfer import to_device, to_host
from .approximation import Approximation
from .stack import LayerStack
from .starts import Start

CANDIDATES = 2  # times as many components as may be carried are looked at


@dataclass(frozen=True)
class Loud:
    """Explicit components ``index`` (k,) of a start, and the last layer ``until`` (k,) where each is loud, or -1.

    ``next`` (j,) are others that were looked at, not loud enough or too many, and ``gates`` (j,) their largest |g/T|.
    """

    index: Tensor
    until: Tensor
    next: Tensor
    gates: Tensor

    def joined(self, other: Loud) -> Loud:
        """Return these and others, none of them among these."""
        further = ~torch.isin(self.next, other.index)
        index, until = torch.cat([self.index, other.index]), torch.cat([self.until, other.until])
        return Loud(index, until, self.next[further], self.gates[further])


_EMPTY = torch.zeros(0, dtype=torch.long, device="cpu")
NOBODY = Loud(_EMPTY, _EMPTY, _EMPTY, torch.zeros(0, device="cpu"))


def find_loud(
    stack: LayerStack, starts: Sequence[Start], approximation: Approximation, most: int, budget: int
) -> list[Loud]:
    """Return the loud components of every start, the ``most`` loudest; ``budget`` bounds the gates held at once."""
    candidates = _candidates(stack, starts, approximation, CANDIDATES * most)
    found = []
    for index, gates, until in _listen(stack, starts, candidates, approximation, budget):
        order = gates.argsort(descending=True, stable=True)
        count = min(most, int((gates >= approximation.loud).sum()))
        carried, others = order[:count], order[count:]
        found.append(Loud(index[carried], until[carried], index[others], gates[others]))
    return found


def loud_until(
    stack: LayerStack, starts: Sequence[Start], index: Sequence[Tensor], approximation: Approximation, budget: int
) -> list[Loud]:
    """Return given components of every start, (k,) in host memory each, with the last layers where they are loud."""
    heard = _listen(stack, starts, index, approximation, budget)
    return [Loud(members, until, _EMPTY, NOBODY.gates) for members, _, until in heard]


def _candidates(stack: LayerStack, starts: Sequence[Start], approximation: Approximation, most: int) -> list[Tensor]:
    """Return the components that are largest at the MLP that they reach first, and not quiet there.

    (k,) each, in host memory; none of those that start where the stack ends.
    """
    early = [start for start in starts if start.entering < stack.end]
    values, indices = [], []
    for _, run in groupby(early, key=lambda start: (len(start.named), start.bias.device)):
        sizes = [start.named.sizes(*stack.reading(start.entering, start.bias)) for start in run]
        largest = torch.stack(sizes).topk(min(most, len(sizes[0])), dim=1)
        values += largest.values.unbind()
        indices += largest.indices.unbind()
    found = to_host([*values, *indices])
    values, indices = found[: len(early)], found[len(early) :]
    responses = stack.responses([start.entering for start in early])
    quiet = approximation.quiet * approximation.temperature
    audible = [int((size * by >= quiet).sum()) for size, by in zip(values, responses, strict=True)]
    chosen = [index[:count] for index, count in zip(indices, audible, strict=True)]
    return chosen + [_EMPTY] * (len(starts) - len(early))  # the late ones are the last


def _listen(
    stack: LayerStack, starts: Sequence[Start], chosen: Sequence[Tensor], approximation: Approximation, budget: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return ``chosen`` components of every start, their largest |g/T|, and the last layer where it is loud.

    (k,) each, in host memory, as ``chosen`` are. The gates are those of what the components wrote into the residual
    stream, at every MLP ahead, without what layers in between make of it. A trained model's gates are heavy-tailed:
    their root mean square does not show a component that drives one neuron alone.
    """
    sizes, first = [len(members) for members in chosen], starts[0].entering
    vectors, amounts = _directions(starts, chosen)
    amounts.abs_().div_(approximation.temperature)
    heard = amounts.new_zeros(max(0, stack.end - first) + 1, sum(sizes))
    for layer in range(first, stack.end):
        maps = stack.maps(layer)
        vectors, amounts, heard = (x.to(maps.device) for x in (vectors, amounts, heard))
        under_way = sum(size for start, size in zip(starts, sizes, strict=True) if start.entering <= layer)
        if under_way:
            here, out = amounts[maps.queries, :under_way], heard[layer - first, :under_way]
            maps.largest_gates(vectors[:under_way], here, out, budget)
    heard = heard.cpu()
    layers = torch.arange(first, stack.end + 1, device="cpu")[:, None]
    until = layers.masked_fill(~(heard >= approximation.loud), -1)
    return list(zip(chosen, heard.amax(0).split(sizes), until.amax(0).split(sizes), strict=True))


def _directions(starts: Sequence[Start], chosen: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return vectors (ΣK, D) of components ``chosen`` (K,) of every start, and how much lies where, (N, ΣK)."""
    device, like = starts[0].bias.device, starts[0].bias
    index = to_device(torch.cat(list(chosen)), device).split([len(members) for members in chosen])
    parts = [
        start.named.directions(members.to(start.bias.device)) for start, members in zip(starts, index, strict=True)
    ]
    vectors = torch.cat([vector.to(device) for vector, _ in parts]).to(like)
    return vectors, torch.cat([amount.to(device) for _, amount in parts], dim=1)
