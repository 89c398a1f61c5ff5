"""The components that are too loud for a first order: any that drives a neuron alone (docs/adjoint.md, 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime.transfer import to_device
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
    chosen = [to_device(members, start.bias.device) for start, members in zip(starts, index, strict=True)]
    heard = _listen(stack, starts, chosen, approximation, budget)
    return [Loud(members, until, _EMPTY, NOBODY.gates) for members, _, until in heard]


def _candidates(stack: LayerStack, starts: Sequence[Start], approximation: Approximation, most: int) -> list[Tensor]:
    """Return the components that are largest at the MLP that they reach first, and not quiet there: (k,) each."""
    found, sizes = [], []
    for start in starts:
        if start.entering >= stack.end:
            found.append(torch.zeros(0, dtype=torch.long, device=start.bias.device))
            sizes.append(start.bias.new_zeros(0))
            continue
        weight, gate = stack.drive(start.entering, start.bias)
        size = start.named.sizes(weight).amax(0) * (gate / approximation.temperature)
        largest = size.topk(min(most, len(size)))
        found.append(largest.indices)
        sizes.append(largest.values)
    audible = [(size >= approximation.quiet).sum().to(sizes[0].device) for size in sizes]
    return [index[:count] for index, count in zip(found, torch.stack(audible).tolist(), strict=True)]


def _listen(
    stack: LayerStack, starts: Sequence[Start], chosen: Sequence[Tensor], approximation: Approximation, budget: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return ``chosen`` components of every start, their largest |g/T|, and the last layer where it is loud.

    (k,) each, in host memory. The gates are those of what the components wrote into the residual stream, at every MLP
    ahead, without what layers in between make of it. A trained model's gates are heavy-tailed: their root mean square
    does not show a component that drives one neuron alone.
    """
    parts = [start.named.directions(index) for start, index in zip(starts, chosen, strict=True)]
    sizes, temperature = [len(index) for index in chosen], approximation.temperature
    vectors = largest = until = parts[0][0].new_zeros(0)
    amounts = parts[0][1].new_zeros(stack.n, 0)
    entered = 0
    for layer in range(starts[0].entering, stack.end):
        maps = stack.maps(layer)
        joining = [part for start, part in zip(starts, parts, strict=True) if start.entering == layer]
        entered += len(joining)
        vectors = torch.cat([vectors.to(maps.device), *(v.to(maps.device) for v, _ in joining)])
        amounts = torch.cat([amounts.to(maps.device), *(a.to(maps.device) for _, a in joining)], dim=1)
        new = len(vectors) - len(largest)
        largest = torch.cat([largest.to(maps.device), vectors.new_zeros(new)])
        until = torch.cat([until.to(maps.device), vectors.new_full((new,), -1.0)])
        if not len(vectors):
            continue
        at = (amounts[maps.queries] * maps.mlp_scale).amax(0)
        gates = maps.largest_gates(vectors, budget).mul_(at / temperature)
        largest = torch.maximum(largest, gates)
        until = until.masked_fill(gates >= approximation.loud, float(layer))
    late = sum(sizes[entered:])  # they start where the stack ends
    largest = torch.cat([largest, largest.new_zeros(late)]).cpu()
    until = torch.cat([until, until.new_full((late,), -1.0)]).cpu().long()
    index = torch.cat([members.to(chosen[0].device) for members in chosen]).cpu()
    return list(zip(index.split(sizes), largest.split(sizes), until.split(sizes), strict=True))
