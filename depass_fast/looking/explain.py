"""The logits of one query of a layer, as sums over the components of query and keys (DESIGN.md section 9)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..trace.record import AttentionTrace
from .logits import logits_of
from .rows import PromptRows
from .sides import Side, Sides

_HELD = 1 << 24  # numbers of gradients that are held at once


@dataclass(frozen=True)
class Explained:
    """The logits of H heads at one query, over K keys, and the shares of M components in them.

    ``logits`` and ``probabilities`` are (H, K), ``query_side`` and ``key_side`` (H, K, M). Over all keys that are seen,
    ``query_mean`` and ``key_mean`` (H, M) are the averages of the shares under P, and ``entropy`` (H,) is P's.
    ``sink`` (H,) is the probability of nothing, None where there is no sink.
    """

    logits: Tensor
    probabilities: Tensor
    query_side: Tensor
    key_side: Tensor
    query_mean: Tensor
    key_mean: Tensor
    entropy: Tensor
    sink: Tensor | None
    error: Tensor  # () the largest |Σ_m share - logit|, relative to Σ_m |share| and the products that a logit sums up


def explain(
    rows: PromptRows,
    sides: Sides,
    trace: AttentionTrace,
    span: slice,
    heads: Sequence[int],
    query: int,
    keys: Sequence[int],
) -> Explained:
    """Share out the logits of ``heads`` at local position ``query`` over the ``keys`` that it sees."""
    device, n = sides.q.device, query + 1
    first = trace.first_seen(query)
    found = logits_of(sides, trace, span, slice(None), torch.tensor([query], device=device), n)
    which = torch.tensor(heads, device=device)
    values, ratio = found.values[which, 0], found.ratio[which, 0]  # (H, K'), (H, N)
    p = values.softmax(-1)
    bias = None if found.bias is None else found.bias[which, 0]
    chosen = torch.tensor(list(keys), device=device)
    query_side, query_mean = _query_side(rows, sides, which, query, ratio, p[:, :n], bias, chosen)
    key_side, key_mean = _key_side(rows, sides, which, query, ratio, p[:, :n], bias, first, keys)
    if found.has_sink:
        assert rows.bias is not None
        for mean in (query_mean, key_mean):
            mean[:, rows.bias] += p[:, -1] * values[:, -1]
    logits = values[:, chosen]
    tiny = torch.finfo(logits.dtype).tiny
    products = sides.q[query, which, None] * sides.k[chosen][:, which // sides.groups].transpose(0, 1)  # (H, K, d)
    sizes = (products.norm(dim=-1) * ratio[:, chosen].abs()).clamp_min(tiny)
    errors = [((s.sum(-1) - logits).abs() / (s.abs().sum(-1) + sizes)).max() for s in (query_side, key_side)]
    return Explained(
        logits=logits,
        probabilities=p[:, chosen],
        query_side=query_side,
        key_side=key_side,
        query_mean=query_mean,
        key_mean=key_mean,
        entropy=torch.special.entr(p).sum(-1),
        sink=p[:, -1] if found.has_sink else None,
        error=torch.stack(errors).max(),
    )


def parts_at(rows: PromptRows, side: Side, position: int, like: Tensor) -> Tensor:
    """Return what every component adds to the queries, or the keys, of all heads at a position: (M, H, d)."""
    given, index = rows.at(position, like)
    at = torch.full((len(given),), position, device=like.device)
    read = side.read(given, at)
    out = read.new_zeros(len(rows.labels), *read.shape[1:])
    out[index] = read
    if side.constant is not None:
        assert rows.bias is not None
        out[rows.bias] += side.constant[position]
    return out


def _query_side(
    rows: PromptRows,
    sides: Sides,
    heads: Tensor,
    query: int,
    ratio: Tensor,
    p: Tensor,
    bias: Tensor | None,
    keys: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the shares of the query's components in the logits of ``keys``, (H, K, M), and their average (H, M)."""
    parts = parts_at(rows, sides.of_q, query, sides.q)[:, heads]  # (M, H, d)
    k = sides.k[: query + 1, heads // sides.groups] * ratio.T[..., None]  # (N, H, d)
    shares = torch.einsum("mhd,khd->hkm", parts, k[keys])
    mean = torch.einsum("mhd,hd->hm", parts, torch.einsum("hk,khd->hd", p, k))
    if bias is not None:
        assert rows.position is not None
        shares[..., rows.position] += bias[:, keys]
        mean[:, rows.position] += (p * bias).sum(-1)
    return shares, mean


def _key_side(
    rows: PromptRows,
    sides: Sides,
    heads: Tensor,
    query: int,
    ratio: Tensor,
    p: Tensor,
    bias: Tensor | None,
    first: int,
    keys: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Return the shares of every key's components in its logit, (H, K, M), and their average (H, M).

    ``first`` is the first key that is seen. A share is the product of a row with the gradient of the logit there: no
    component's keys are ever made.
    """
    q, place = sides.q[query, heads], {key: i for i, key in enumerate(keys)}
    shares = q.new_zeros(len(heads), len(keys), len(rows.labels))
    mean = q.new_zeros(len(heads), len(rows.labels))
    step = max(1, _HELD // (len(heads) * rows.state.rows.shape[1]))
    for begin in range(first, query + 1, step):
        here = range(begin, min(begin + step, query + 1))
        side = sides.of_k.at(slice(here.start, here.stop))
        y = q * ratio[:, here.start : here.stop].T[..., None]  # (n, H, d)
        gradients = side.back_by_head(y, heads // sides.groups)
        dots = rows.dots(gradients, here)
        if side.constant is not None:
            assert rows.bias is not None
            own = side.constant[:, heads // sides.groups]  # (n, H, d)
            dots[..., rows.bias] += torch.einsum("nhd,hd->hn", own, q) * ratio[:, here.start : here.stop]
        if bias is not None:
            assert rows.position is not None
            dots[..., rows.position] += bias[:, here.start : here.stop]
        mean += torch.einsum("hn,hnm->hm", p[:, here.start : here.stop], dots)
        for key in place.keys() & set(here):
            shares[:, place[key]] = dots[:, key - begin]
    return shares, mean
