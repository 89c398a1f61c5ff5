"""Keys that are values (DeepSeek V4): projections that stand side by side, or one behind the other by groups of heads.

Entries stand for windows of positions: each is a sum of their values, with weights by position and channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .maps import Linear


@dataclass(frozen=True)
class WithEntries:
    """Values of positions, of ``down``, and what entries are made of, of ``entries``: one weight (C, D) for both."""

    down: Linear
    entries: Linear

    bias: ClassVar[None] = None
    has_bias: ClassVar[bool] = False
    is_own: ClassVar[bool] = False  # its weight is made when it is read

    @property
    def shape(self) -> tuple[int, int]:
        return self.down.shape[0] + self.entries.shape[0], self.down.shape[1]

    @property
    def device(self) -> torch.device:
        return self.down.device

    @cached_property
    def weight(self) -> Tensor:
        return torch.cat([self.down.weight, self.entries.weight])


@dataclass(frozen=True)
class Grouped(Linear):
    """An output projection behind ``front``, which projects G groups of heads, each by itself; there are no biases.

    ``front`` stores (G·r, H·d / G), the projection itself is (D, G·r).
    """

    front: Linear | None = None
    groups: int = 1

    @cached_property
    def shape(self) -> tuple[int, int]:
        assert self.front is not None
        return super().shape[0], self.front.shape[1] * self.groups

    @cached_property
    def weight(self) -> Tensor:
        assert self.front is not None
        behind = Linear(self.module).weight
        wide = torch.promote_types(behind.dtype, torch.float32)
        out, first = behind.to(wide).unflatten(1, (self.groups, -1)), self.front.weight.to(wide)
        product = torch.einsum("dgr,grc->dgc", out, first.unflatten(0, (self.groups, -1)))
        return product.flatten(1).to(behind.dtype)

    @property
    def is_own(self) -> bool:
        return False

    def entering(self, heads: Tensor) -> Tensor:
        """The input of the module itself (S, G·r), given what the heads give (S, H·d)."""
        assert self.front is not None
        first = self.front.weight.unflatten(0, (self.groups, -1))
        return torch.einsum("sgc,grc->sgr", heads.to(first).unflatten(1, (self.groups, -1)), first).flatten(1)


def grouped(behind: Linear, front: nn.Module | None, groups: int) -> Linear:
    """An output projection, and what is in front of it, as one; ``front`` None: nothing is."""
    return behind if front is None else Grouped(behind.module, front=Linear(front), groups=groups)


def key_ratios(keys: Tensor, norm: Any) -> Tensor:
    """The factors (T, d) that an RMSNorm has for keys (T, d)."""
    wide = keys.to(torch.promote_types(keys.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.variance_epsilon)
    return scale * norm.weight.to(wide)


def entry_ratios(values: Tensor, gates: Tensor, module: Any, overlaps: bool) -> Tensor:
    """The weights (T, c) of values (T, c) of one prompt in the entries that they are part of, their norm included.

    ``module`` has the ``compress_rate`` of positions in a window, the ``position_bias`` of gates (T, c), and the
    ``kv_norm`` of entries. Weights are a softmax of gates over a window, by channel. Where entries ``overlap``, the
    first half of the channels belongs to the next window's entry, and both halves share one softmax. Values that are
    part of no entry, behind the last whole window, have weights of zero.
    """
    rate, wide = module.compress_rate, torch.promote_types(values.dtype, torch.float32)
    n = len(values) // rate
    out = values.new_zeros(values.shape, dtype=wide)
    if n == 0:
        return out
    values, gates = (x[: n * rate].to(wide).unflatten(0, (n, rate)) for x in (values, gates))
    gates = gates + module.position_bias.to(wide)
    if overlaps:
        values, gates = _with_the_window_before(values, 0.0), _with_the_window_before(gates, -torch.inf)
    weights = gates.softmax(1)  # (E, slots, d)
    weights = weights * key_ratios((weights * values).sum(1), module.kv_norm)[:, None]
    if overlaps:
        before = torch.cat([weights[1:, :rate], weights.new_zeros(1, *weights[0, :rate].shape)])
        weights = torch.cat([before, weights[:, rate:]], -1)
    out[: n * rate] = weights.flatten(0, 1)
    return out


def _with_the_window_before(x: Tensor, nothing: float) -> Tensor:
    """Return (E, 2·rate, d): the first channels of the window before and the last of the window, of (E, rate, 2·d)."""
    next_ones, own = x.chunk(2, -1)
    before = torch.cat([torch.full_like(next_ones[:1], nothing), next_ones[:-1]])
    return torch.cat([before, own], 1)


def read_keys(attention: Any, outputs: list[Tensor]) -> Tensor:
    """Return the values' factors (T, d) of an attention with a ``kv_norm``: those of keys."""
    return key_ratios(outputs[0], attention.kv_norm)


def read_entries(attention: Any, outputs: list[Tensor], overlaps: bool) -> Tensor:
    """Return the factors (T, C) of keys, then those of entries by its ``compressor``; see :func:`entry_ratios`."""
    keys, values, gates = outputs
    return torch.cat([read_keys(attention, [keys]), entry_ratios(values, gates, attention.compressor, overlaps)], 1)
