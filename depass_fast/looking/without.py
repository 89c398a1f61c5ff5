"""A head without a component in its input: where it would look, exactly, norms included, for all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..trace.record import AttentionTrace
from .logits import finished
from .rows import PromptRows
from .sides import Side, Sides, frozen_at

QUERY, KEY, BOTH = "query", "key", "both"
TAKEN_OUT = (QUERY, KEY, BOTH)


def whole(side: Side, x: Tensor) -> Tensor:
    """Return the queries, or keys, (N, H, d) that the model makes of its input ``x`` (N, D), with their derivative."""
    own = frozen_at(side, x)
    found = own.read(x, slice(None))
    return found if own.constant is None else found + own.constant


def looks_without(
    rows: PromptRows,
    sides: Sides,
    trace: AttentionTrace,
    span: slice,
    heads: Sequence[int],
    query: int,
    side: str,
    norms_react: bool,
) -> Tensor:
    """Return where heads look from local position ``query`` without each of M components: (H, M, N), N = query + 1.

    ``side`` says whether they are taken out of what the query reads, of what the keys read, or of both. Norms in front
    of queries and keys are of what is left where they react; else they are held, and clamps with them. Constants stay.
    """
    device, n, m = sides.q.device, query + 1, len(rows.labels)
    which = torch.tensor(list(heads), device=device)
    x, kv = trace.resid[span], which // sides.groups
    q = sides.q[query, which].expand(m, -1, -1)  # (M, H, d)
    if side in (QUERY, BOTH):
        q = _left(rows, sides.of_q, sides.q, x, query, norms_react)[:, which]
    raw = q.new_zeros(len(which), m, 1, n)
    for key in range(trace.first_seen(query), n):
        k = sides.k[key, kv]
        if side in (KEY, BOTH):
            k = _left(rows, sides.of_k, sides.k, x, key, norms_react)[:, kv]
        raw[:, :, 0, key] = (q * k).sum(-1).T * trace.scale
    bias = None if trace.key_bias is None else trace.key_bias[span][:n, which].to(raw).T[:, None, None]
    sink = None if sides.sink is None else sides.sink[which, None, None, None]
    values = finished(raw, trace, span, torch.tensor([query], device=device), bias, sink)
    return values.softmax(-1)[:, :, 0, :n]


def _left(rows: PromptRows, side: Side, own: Tensor, x: Tensor, position: int, norms_react: bool) -> Tensor:
    """Return the queries, or keys, of a position without each of the components: (M, H, d)."""
    given, index = rows.at(position, own)
    out = own[position].expand(len(rows.labels), -1, -1).clone()
    if norms_react:  # added to what was recorded, so that nothing changes where nothing is taken out
        here = x[position].to(own)[None]
        at = torch.full((len(given) + 1,), position, device=own.device)
        made = whole(side.at(at), torch.cat([here, here - given]))
        out[index] += made[1:] - made[:1]
    else:
        out[index] -= side.read(given, torch.full((len(given),), position, device=own.device))
    return out
