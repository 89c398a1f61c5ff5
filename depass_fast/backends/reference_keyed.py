"""Keys that are values, for the reference backend: one query at a time, every rotation as a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from ..adapters import Attention
from ..trace.mixers import KeyedTrace
from ..trace.record import AttentionTrace


def keyed_heads(weights: Attention, trace: AttentionTrace, values: Tensor, where: Tensor, read: Tensor) -> Tensor:
    """Return what heads give (Q, M, H·d) at local positions ``read`` (Q,) for values (N, M, C) of one prompt.

    ``where`` (N,) are its packed positions.
    """
    frozen, dtype, d = trace.keyed, values.dtype, weights.head_dim
    assert frozen is not None and trace.value_ratio is not None
    values = values * trace.value_ratio[where].to(dtype)[:, None]
    turns = torch.stack([_rotation(frozen, at, d, dtype) for at in where.tolist()])  # (N, d, d)
    keys, made = trace.k[where, 0].to(dtype), torch.einsum("nde,nme->nmd", turns, values[..., :d])
    n_entries = 0 if frozen.rate is None else len(where) // frozen.rate
    if frozen.rate is not None and frozen.entries is not None:
        entries = [turns[e * frozen.rate] @ _entry(frozen, values, e, d) for e in range(n_entries)]
        keys = torch.cat([keys, frozen.entries[where[frozen.rate - 1 :: frozen.rate]].to(dtype)])
        made = torch.cat([made, *(entry.mT[None] for entry in entries)])
    out = []
    for query in read.tolist():
        seen = torch.zeros(len(keys), dtype=torch.bool, device=keys.device)
        seen[trace.first_seen(query) : query + 1] = True
        if frozen.rate is not None:
            closed = range((query + 1) // frozen.rate)
            chosen = None if trace.chosen_keys is None else trace.chosen_keys[where[query]].tolist()
            seen[[len(where) + e for e in closed if chosen is None or e in chosen]] = True
        logits = (trace.q[where[query]].to(dtype) @ keys.T * trace.scale).masked_fill(~seen, -torch.inf)  # (H, K)
        if frozen.sinks is not None:
            logits = torch.cat([logits, frozen.sinks.to(dtype)[:, None]], 1)
        p = logits.softmax(1)[:, : len(keys)]
        heads = torch.einsum("hk,kmd->mhd", p, made)
        out.append((heads @ turns[query]).flatten(1))  # a row times R is R's transpose times it
    return torch.stack(out)


def _entry(frozen: KeyedTrace, values: Tensor, number: int, d: int) -> Tensor:
    """Return the entry of one window, of scaled values (N, M, C), before it is turned: (d, M)."""
    assert frozen.rate is not None
    first, stop = number * frozen.rate, (number + 1) * frozen.rate
    total = values[first:stop, :, -d:].sum(0)
    if frozen.overlaps and number > 0:
        total = total + values[first - frozen.rate : first, :, d : 2 * d].sum(0)
    return total.T


def _rotation(frozen: KeyedTrace, at: int, d: int, dtype: torch.dtype) -> Tensor:
    """Return the rotation at a packed position: (d, d)."""
    cos, sin = frozen.cos[at].to(dtype), frozen.sin[at].to(dtype)
    out = torch.eye(d, dtype=dtype, device=cos.device)
    for pair in range(len(cos)):
        first = d - 2 * len(cos) + 2 * pair
        out[first, first] = out[first + 1, first + 1] = cos[pair]
        out[first, first + 1], out[first + 1, first] = -sin[pair], sin[pair]
    return out
