"""Attention and a recurrence that read the same and whose outputs are added, as one: the heads of both side by side.

Heads of the narrower kind are filled up with zeros, and KV heads are repeated for all heads that share them, so that
all heads have values of their own and of one width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from .weights import Attention, Linear

Sides = tuple[Attention, Attention]


def side_by_side(softmax: Attention, recurrent: Attention) -> Attention:
    """One layer's attention and recurrence, the heads of attention first. Both read through the same norm."""
    sides = (softmax, recurrent)
    width = max(one.head_dim for one in sides)
    module = recurrent.v_input.module
    return Attention(
        norm=recurrent.norm,
        output=None,
        stream=None,
        factor=1.0,
        keeps=recurrent.keeps,
        v=Joined(module, sides=sides, what="v"),
        o=Joined(recurrent.o.module, sides=sides, what="o"),
        head_dim=width,
        key_dim=width,
        conv=None if recurrent.conv is None else Joined(recurrent.conv.module, sides=sides, what="conv"),
        is_recurrent=True,
        scales_heads=True,
    )


def spread(x: Tensor, given: int, heads: int, width: int) -> Tensor:
    """Return the numbers of ``given`` heads on the first axis as those of ``heads`` heads of so large a ``width``."""
    each = x.unflatten(0, (given, -1)).repeat_interleave(heads // given, 0)
    filled = each.new_zeros(heads, width, *each.shape[2:])
    filled[:, : each.shape[1]] = each
    return filled.flatten(0, 1)


def beside_each_other(sides: Sides, parts: Sequence[Tensor | None], fill: float = 0.0) -> Tensor:
    """Return what both sides give at T positions, (T, H·d) of each, as one. A part that is None is ``fill``."""
    width, done = max(one.head_dim for one in sides), []
    like = next(part for part in parts if part is not None)
    for side, part in zip(sides, parts, strict=True):
        if part is None:
            done.append(like.new_full((side.n_heads * width, len(like)), fill))
        else:
            done.append(spread(part.T, part.shape[1] // side.head_dim, side.n_heads, width))
    return torch.cat(done).T.contiguous()


@dataclass(frozen=True)
class Joined(Linear):
    """The projections to the values of both sides as one, or their output projections, or the taps of a convolution."""

    sides: Sides | tuple[()] = ()
    what: Literal["v", "o", "conv"] = "v"

    @property
    def _each(self) -> list[tuple[Attention, Linear | None]]:
        return [(side, getattr(side, self.what)) for side in self.sides]

    @property
    def _width(self) -> int:
        return max(side.head_dim for side in self.sides)

    @cached_property
    def shape(self) -> tuple[int, int]:
        every = sum(side.n_heads for side in self.sides) * self._width
        hidden = next(side.o.shape[0] for side in self.sides)
        return {"v": (every, hidden), "o": (hidden, every), "conv": (every, 1)}[self.what]

    @cached_property
    def weight(self) -> Tensor:
        if self.what == "o":
            every = [self._filled(side, one.weight.T * side.factor, side.n_heads) for side, one in self._each if one]
            return torch.cat(every).T
        if self.what == "v":
            return torch.cat(
                [self._filled(side, one.weight * side.reads, side.n_kv_heads) for side, one in self._each if one]
            )
        taps = next(one.weight for _, one in self._each if one is not None)
        passes = torch.zeros_like(taps[:1])
        passes[..., -1] = 1.0  # where there is no convolution
        every = [
            passes.repeat(side.n_heads * self._width, 1, 1)
            if one is None
            else self._filled(side, one.weight, side.n_kv_heads)
            for side, one in self._each
        ]
        return torch.cat(every)

    @cached_property
    def bias(self) -> Tensor | None:
        each = [(side, None if one is None or not self.keeps_bias else one.bias) for side, one in self._each]
        if all(bias is None for _, bias in each):
            return None
        if self.what == "o":
            return torch.stack([bias * side.factor for side, bias in each if bias is not None]).sum(0)
        like = next(bias for _, bias in each if bias is not None)
        zeros = (like.new_zeros(side.n_heads * self._width) for side, _ in each)
        every = [
            zero if bias is None else self._filled(side, bias, side.n_kv_heads)
            for (side, bias), zero in zip(each, zeros, strict=True)
        ]
        return torch.cat(every)

    @property
    def has_bias(self) -> bool:
        return self.keeps_bias and any(one is not None and one.has_bias for _, one in self._each)

    @property
    def is_own(self) -> bool:
        return False  # its weight is made when it is read

    def _filled(self, side: Attention, x: Tensor, given: int) -> Tensor:
        return spread(x, given, side.n_heads, self._width)
