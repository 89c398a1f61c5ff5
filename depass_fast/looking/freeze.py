"""Queries and keys of a trace, frozen, and compared with those that were recorded."""

from __future__ import annotations

import torch
from torch import Tensor

from ..adapters import Adapter, Latent, query_key
from ..adapters.query_key import Projected, sinks
from ..trace.consistency import READING
from ..trace.record import AttentionTrace
from ..trace.turns import Turn, Turns
from .sides import Side, Sides, frozen

_ROUNDINGS = 4  # in half precision, of projection, norm and rotary embedding, in eps
_EXACT = 1e-4


def freeze_sides(
    adapter: Adapter, index: int, trace: AttentionTrace, span: slice, turns: Turns, dtype: torch.dtype
) -> Sides:
    """Freeze the queries and keys of layer ``index`` in the prompt at ``span``, and compare them with those recorded.

    Raises:
        ValueError: they are not those of the model; the message names the family.
    """
    branch, weights = adapter.attention(index), query_key(adapter, index)
    x = trace.resid[span].to(dtype)
    recorded = trace.q[span].to(dtype), trace.k[span].to(dtype)
    made, off = [], 0.0
    for name, projected, heads, turn, own in (
        ("queries", weights.q, branch.n_heads, turns.q, recorded[0]),
        ("keys", weights.k, recorded[1].shape[1], turns.k, recorded[1]),
    ):
        turn = Turn(*(part[: len(x)] if part.dim() == 2 else part for part in turn))
        side = frozen(branch, projected, heads, turn, weights.norm_is_last, x)
        off = max(off, _difference(adapter, index, name, projected, trace.q.dtype, side, x, own))
        made.append(side)
    sink = sinks(adapter, index)
    return Sides(made[0], made[1], *recorded, off, None if sink is None else sink.to(dtype))


def _difference(
    adapter: Adapter, index: int, name: str, projected: Projected, held: torch.dtype, side: Side, x: Tensor, own: Tensor
) -> float:
    """Return how far a side is from what was recorded, relatively. Raises ValueError where that is no rounding."""
    found = side.read(x, slice(None))
    found = found if side.constant is None else found + side.constant
    parts = (projected.own.down, projected.own.up) if isinstance(projected.own, Latent) else (projected.own,)
    plain = all(part.is_own for part in parts)
    allowed = max(_EXACT, _ROUNDINGS * torch.finfo(held).eps) if plain else READING
    sizes = own.flatten(1).norm(dim=1) + found.flatten(1).norm(dim=1)
    off = float(((found - own).flatten(1).norm(dim=1) / sizes.clamp_min(torch.finfo(x.dtype).tiny)).max())
    if not off <= allowed:
        raise ValueError(
            f"model: the {name} of layer {index} are not what the family {adapter.config.model_type!r} declares (a "
            f"difference of {off:.1%}); attention in this model cannot be explained."
        )
    return off
