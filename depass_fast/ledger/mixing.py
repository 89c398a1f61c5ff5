"""The way back through a recurrence, or keys that are values: the transpose of all between values and output."""

from __future__ import annotations

import torch
from torch import Tensor

from ..adapters import Attention
from ..trace.keyed import frozen_mixing
from ..trace.record import AttentionTrace
from .batches import Packing


def through_recurrence(
    weights: Attention, trace: AttentionTrace, packing: Packing, partial: bool, y: Tensor, values: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Take gradients ``y`` (R, A, H·d) of what heads give back to values (R, T, Hkv·d), prompt by prompt.

    The second are the heads' scores (R, P, H), given the values (T, Hkv, d) without their constants.
    """
    read, shares = _back(weights, trace, packing, partial, y, values)
    return read, None if shares is None else packing.sum(shares, False)


def sources_of_recurrence(
    weights: Attention, trace: AttentionTrace, packing: Packing, partial: bool, y: Tensor, values: Tensor
) -> Tensor:
    """Return the heads' scores (R, T, H) by the position whose values they carry."""
    shares = _back(weights, trace, packing, partial, y, values)[1]
    assert shares is not None
    return shares


def _back(
    weights: Attention, trace: AttentionTrace, packing: Packing, partial: bool, y: Tensor, values: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of values (R, T, Hkv·d), and the heads' scores by position (R, T, H), given the values."""
    wide, at = torch.promote_types(y.dtype, torch.float32), packing.at(partial, y.device)
    y = y.to(wide)
    if at is not None:
        y = y.new_zeros(len(y), packing.n_positions, y.shape[2]).index_copy_(1, at, y)
    read, shares = y.new_empty(len(y), packing.n_positions, weights.v.shape[0]), None
    if values is not None:
        shares = y.new_empty(len(y), packing.n_positions, weights.n_heads)
    for prompt in range(packing.n_prompts):
        span = slice(int(packing.offsets[prompt]), int(packing.offsets[prompt + 1]))
        mixing = frozen_mixing(weights, trace, span, wide)
        given = None if values is None else values[span].flatten(1).to(wide)
        of_values, found = mixing.back(y[:, span].transpose(0, 1), given)  # (N, R, Hkv·d), (N, R, H)
        read[:, span] = of_values.transpose(0, 1)
        if found is not None and shares is not None:
            shares[:, span] = found.transpose(0, 1)
    return read, shares
