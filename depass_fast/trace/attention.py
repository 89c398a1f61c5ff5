"""Causal attention: in the recorded forward pass, and its probabilities as the trace gives them.

It is fused wherever PyTorch can, else it runs tile by tile: N² logits are never held.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from .record import AttentionTrace
from .selection import seen_by_heads, selected

TILE = {True: 1 << 21, False: 1 << 24}  # most logits held at once, in elements: on a CPU and elsewhere


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    key_bias: Tensor | None = None,
    sinks: Tensor | None = None,
    chosen_keys: Tensor | None = None,
    chunked: bool = False,
    key_block: int | None = None,
    position_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of prompts of one length: q (P, H, N, d), k (P, Hkv, N, d) and v (P, Hkv, N, v) -> (P, H, N, v).

    ``key_bias`` (N, H) is added to the logits of keys. ``sinks`` (H,) are logits of nothing; with them the sums of P's
    rows are returned as well, (P, H, N) in float32 or wider, else None. ``chosen_keys`` (P, N, K) are those that
    queries may see. ``window``, ``chunked`` and ``key_block`` are those of the trace. ``position_bias`` (P, H, N, N) is
    added to the logits, alone.
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    if position_bias is not None:
        seen = causal_mask(torch.arange(q.shape[2], device=q.device), q.shape[2], window, chunked)
        mask = position_bias.to(q).masked_fill(~seen, -torch.inf)
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale), None
    if softcap is None and key_bias is None and sinks is None and chosen_keys is None:
        return _fused(q, k, v, scale, window, chunked), None
    return _tiled(q, k, v, scale, window, softcap, key_bias, sinks, chosen_keys, chunked, key_block)


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, chunked: bool) -> Tensor:
    """Attention by torch's fused kernels, a window's worth of queries at a time: no mask of N x N."""
    n = q.shape[2]
    if window is None or window >= n:
        return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    parts, size = [], max(window, 256)
    for begin in range(0, n, size):
        first, end = max(0, begin - window + 1), min(begin + size, n)
        mask = causal_mask(torch.arange(begin, end, device=q.device), end, window, chunked)[:, first:]
        part = (q[:, :, begin:end], k[:, :, first:end], v[:, :, first:end])
        parts.append(nn.functional.scaled_dot_product_attention(*part, attn_mask=mask, scale=scale))
    return torch.cat(parts, dim=2)


def _tiled(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    key_bias: Tensor | None,
    sinks: Tensor | None,
    chosen_keys: Tensor | None,
    chunked: bool,
    key_block: int | None,
) -> tuple[Tensor, Tensor | None]:
    """Attention whose logits are changed before the softmax, some queries at a time, and the sums of P's rows."""
    n = q.shape[2]
    out, wide = q.new_empty(*q.shape[:-1], v.shape[-1]), torch.promote_types(q.dtype, torch.float32)
    row_sum = None if sinks is None else q.new_empty(q.shape[:-1], dtype=wide)
    for queries in torch.arange(n, device=q.device).split(max(1, TILE[q.device.type == "cpu"] // (q.shape[1] * n))):
        logits = (q[:, :, queries] @ k.transpose(-1, -2)).to(wide) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if key_bias is not None:
            logits = logits + key_bias.T[:, None]
        seen = causal_mask(queries, n, window, chunked)
        if chosen_keys is not None:
            seen = seen & seen_by_heads(chosen_keys[:, queries], n, key_block, q.shape[1])
        logits.masked_fill_(~seen, -torch.inf)
        p = logits.softmax(-1)
        if sinks is not None and row_sum is not None:
            row_sum[:, :, queries] = torch.sigmoid(logits.logsumexp(-1) - sinks.to(wide)[:, None])
            p *= row_sum[:, :, queries, None]
        out[:, :, queries] = p.to(v.dtype) @ v
    return out, row_sum


def causal_mask(queries: Tensor, n_keys: int, window: int | None, chunked: bool = False) -> Tensor:
    """True where a query position sees one of the first ``n_keys`` positions: (Q,) -> (Q, n_keys).

    It sees the last ``window`` positions, or with ``chunked`` those in its own chunk of so many.
    """
    keys = torch.arange(n_keys, device=queries.device)
    mask = keys <= queries[:, None]
    if window is None:
        return mask
    first = queries // window * window if chunked else queries - window + 1
    return mask & (keys >= first[:, None])


def seen_keys(trace: AttentionTrace, span: slice, queries: Tensor, n_keys: int) -> Tensor:
    """True where local positions ``queries`` (Q,) of the prompt at ``span`` see one of its first keys: (Q, n_keys).

    Where keys are selected for every KV head it is (Hkv, 1, Q, n_keys).
    """
    seen = causal_mask(queries, n_keys, trace.window, trace.chunked)
    if trace.chosen_keys is None:
        return seen
    chosen = trace.chosen_keys[span][queries]
    if trace.key_block is None:
        return seen & selected(chosen, n_keys)
    return seen & seen_by_heads(chosen, n_keys, trace.key_block, trace.k.shape[1])[:, None]


def check_softmax(trace: AttentionTrace) -> None:
    """Raise ValueError where more than probabilities of positions mixes them."""
    if trace.keyed is not None:
        raise ValueError("trace: values that are keys are turned, too; see FrozenKeyed for all that attention does.")
    if trace.recurrence is not None and trace.recurrence.decay is not None:
        raise ValueError("trace: a recurrence has no attention probabilities; dp.head_weights gives its matrix.")


def attention_probabilities(trace: AttentionTrace, keys: Tensor, queries: Tensor, dtype: torch.dtype) -> Tensor:
    """P of one prompt: packed positions ``keys`` (N,), local positions ``queries`` (Q,) -> (H, Q, N)."""
    check_softmax(trace)
    k = trace.k[keys].to(dtype)
    q = trace.q[keys[queries]].to(dtype)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = torch.einsum("qhd,khd->hqk", q, k) * trace.scale
    if trace.softcap is not None:
        logits = trace.softcap * torch.tanh(logits / trace.softcap)
    if trace.key_bias is not None:
        logits = logits + trace.key_bias[keys].to(dtype).T[:, None]
    if _knows_distances(trace):
        logits = _with_distances(logits, trace, keys[queries], queries)
    seen = causal_mask(queries, len(keys), trace.window, trace.chunked)
    if trace.chosen_keys is not None:
        seen = seen & seen_by_heads(trace.chosen_keys[keys[queries]], len(keys), trace.key_block, len(logits))
    p = _difference(trace, logits.masked_fill(~seen, -torch.inf).softmax(-1))
    return p if trace.row_sum is None else p * trace.row_sum[keys[queries]].to(dtype).T[..., None]


def span_probabilities(trace: AttentionTrace, span: slice, queries: slice, dtype: torch.dtype) -> Tensor:
    """P of one prompt at the packed positions ``span``, for some of its N positions: (H, Q, N).

    The same as :func:`attention_probabilities`, in few operations: no product is larger than it has to be, and none of
    its operands is copied for its own sake.
    """
    check_softmax(trace)
    k, q = trace.k[span].to(dtype), trace.q[span][queries].to(dtype)
    n, kv, groups = len(k), k.shape[1], q.shape[1] // k.shape[1]
    k, q = k.permute(1, 2, 0), q.unflatten(1, (kv, -1)).permute(1, 2, 0, 3).flatten(1, 2)  # (Hkv, d, N), (Hkv, G·Q, d)
    kind = trace.window, trace.chunked
    mask = _mask(queries.start, queries.stop, n, groups, *kind, dtype, q.device)  # (G·Q, N)
    if trace.softcap is None:
        logits = torch.baddbmm(mask, q, k, alpha=trace.scale)
    else:
        logits = torch.tanh(torch.bmm(q, k).mul_(trace.scale / trace.softcap)).mul_(trace.softcap).add_(mask)
    logits = logits.view(kv * groups, -1, n)  # (H, Q, N)
    if trace.key_bias is not None:
        logits += trace.key_bias[span].to(dtype).T[:, None]
    if _knows_distances(trace):
        places = torch.arange(queries.start, queries.stop, device=q.device)
        logits = _with_distances(logits, trace, span.start + places, places)
    if trace.chosen_keys is not None:
        logits.masked_fill_(
            ~seen_by_heads(trace.chosen_keys[span][queries], n, trace.key_block, len(logits)), -torch.inf
        )
    p = _difference(trace, logits.softmax(-1))
    return p if trace.row_sum is None else p.mul_(trace.row_sum[span][queries].to(dtype).T[..., None])


def _knows_distances(trace: AttentionTrace) -> bool:
    """Return True if the logits have a bias by the distance of query and key."""
    return trace.recurrence is not None and trace.recurrence.relative is not None


def _with_distances(logits: Tensor, trace: AttentionTrace, packed: Tensor, local: Tensor) -> Tensor:
    """Return logits (H, Q, N) with a bias by distance, of queries at ``packed`` and ``local`` positions (Q,)."""
    frozen = trace.recurrence
    assert frozen is not None and frozen.relative is not None and frozen.distances is not None
    n, distances = logits.shape[2], frozen.distances[:, : logits.shape[2]].to(logits)
    by_distance = (frozen.relative[packed].to(logits) @ distances).transpose(0, 1)  # (H, Q, distances)
    apart = local[:, None] - torch.arange(n, device=local.device)  # (Q, N)
    at = apart.clamp(0, by_distance.shape[2] - 1).expand(len(logits), -1, -1)
    return logits + by_distance.gather(2, at).masked_fill_((apart < 0) | (apart >= by_distance.shape[2]), 0.0)


def _difference(trace: AttentionTrace, p: Tensor) -> Tensor:
    """Return the probabilities (H, Q, N) of differential attention, given those of both halves, (2H, Q, N)."""
    if trace.minus is None:
        return p
    first, second = p.chunk(2)
    return torch.sub(first, second, alpha=trace.minus)


@lru_cache(maxsize=8)
def _mask(
    first: int,
    stop: int,
    n_keys: int,
    groups: int,
    window: int | None,
    chunked: bool,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """-inf where a query from ``first`` on does not see a key, else zero: (G·Q, n_keys). All layers share it."""
    seen = causal_mask(torch.arange(first, stop, device=device), n_keys, window, chunked).repeat(groups, 1)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)
