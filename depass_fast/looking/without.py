"""A head without a component in its input: where it would look, exactly, norms included, for all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..trace.attention import causal_mask
from ..trace.record import AttentionTrace
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
    head: int,
    query: int,
    side: str,
    norms_react: bool,
) -> Tensor:
    """Return where a head looks from local position ``query`` without each of M components: (M, N), N = query + 1.

    ``side`` says whether they are taken out of what the query reads, of what the keys read, or of both. Norms in front
    of queries and keys are of what is left where they react, else they are held. Constants stay.
    """
    x, kv, n, m = trace.resid[span], head // sides.groups, query + 1, len(rows.labels)
    q = sides.q[query, head].expand(m, -1)  # (M, d)
    if side in (QUERY, BOTH):
        q = _left(rows, sides.of_q, sides.q, x, query, norms_react)[:, head]
    raw = q.new_zeros(m, n)
    for key in range(0 if trace.window is None else max(0, n - trace.window), n):
        k = sides.k[key, kv]
        if side in (KEY, BOTH):
            k = _left(rows, sides.of_k, sides.k, x, key, norms_react)[:, kv]
        raw[:, key] = (q * k).sum(-1) * trace.scale
    values = raw if trace.softcap is None else trace.softcap * torch.tanh(raw / trace.softcap)
    if trace.key_bias is not None:
        values = values + trace.key_bias[span][:n, head].to(values)
    seen = causal_mask(torch.tensor([query], device=values.device), n, trace.window)
    values = values.masked_fill(~seen, -torch.inf)
    if sides.sink is None:
        return values.softmax(-1)
    sink = sides.sink[head].expand(m, 1)
    return torch.cat([values, sink], -1).softmax(-1)[:, :-1]


def _left(rows: PromptRows, side: Side, own: Tensor, x: Tensor, position: int, norms_react: bool) -> Tensor:
    """Return the queries, or keys, of a position without each of the components: (M, H, d)."""
    given, index = rows.at(position, own)
    at = torch.full((len(given),), position, device=own.device)
    out = own[position].expand(len(rows.labels), -1, -1).clone()
    if norms_react:
        out[index] = whole(side.at(at), x[position].to(own) - given)
    else:
        out[index] -= side.read(given, at)
    return out
