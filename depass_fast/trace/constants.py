"""The constant part of what heads mix, where it is not the same at every position, and values behind a convolution."""

from __future__ import annotations

import torch
from torch import Tensor

from ..adapters import Attention
from .attention import span_probabilities
from .mixing import apply, convolve
from .record import AttentionTrace

_QUERIES = 256  # whose probabilities are held at once


def constant_heads(
    weights: Attention, trace: AttentionTrace, lengths: list[int], mixed: Tensor | None
) -> Tensor | None:
    """Return what heads make of the constant part of values (T, H·d), where that depends on the position; else None.

    ``mixed`` is what a recurrence without a softmax beside it has made of that part already.
    """
    if trace.head_scales is not None:
        return _normed_constants(weights, trace, lengths)
    wide, ratio = torch.promote_types(trace.q.dtype, torch.float32), trace.out_ratio
    if trace.recurrence is None:
        value = None if ratio is None else weights.value_constant(wide)
        if value is None or ratio is None:
            return None
        heads = value.view(weights.n_kv_heads, 1, -1).expand(-1, weights.n_heads // weights.n_kv_heads, -1).flatten()
        heads = heads.view(weights.n_heads, -1)
        sums = None if trace.row_sum is None else trace.row_sum.to(wide)[..., None]
        return (heads if sums is None else sums * heads).flatten(-2) * ratio.to(wide)
    if trace.beside is None:
        return mixed if mixed is None or ratio is None else mixed * ratio.to(mixed)
    given = constant_values(weights, trace, lengths)
    if given is None:
        return None
    given = given if trace.value_ratio is None else given * trace.value_ratio.to(wide)
    return apply(weights, trace, given[:, None], lengths)[:, 0]


def constant_values(
    weights: Attention, trace: AttentionTrace, lengths: list[int], span: slice = slice(None)
) -> Tensor | None:
    """Return the constant part of a recurrence's values behind their convolution (T, H·d); None without one.

    ``lengths`` are those of the prompts at packed positions ``span``.
    """
    wide = torch.promote_types(trace.q.dtype, torch.float32)
    value, bias = weights.value_constant(wide), None if weights.conv is None else weights.conv.bias
    if weights.front is not None:
        read = weights.front.constant(lengths, trace.resid.to(wide))
        value = None if read is None else read @ weights.w_v.to(wide).T
    if value is None and bias is None:
        return None
    given = torch.zeros(sum(lengths), weights.v.shape[0], dtype=wide, device=trace.q.device)
    return _behind_convolution(weights, trace, given if value is None else given + value, lengths, bias, span)


def values_before_activation(weights: Attention, trace: AttentionTrace, span: slice) -> Tensor:
    """Return the values of one prompt's residual stream in front of their activation, constants included: (N, H·d)."""
    wide = torch.promote_types(trace.q.dtype, torch.float32)
    x, constant = trace.resid[span].to(wide), weights.value_constant(wide)
    x = x if weights.norm is None else weights.norm.apply(x, weights.scale(x))
    values = x @ weights.w_v.to(wide).T
    values = values if constant is None else values + constant
    bias = None if weights.conv is None else weights.conv.bias
    return _behind_convolution(weights, trace, values, [len(values)], bias, span)


def _behind_convolution(
    weights: Attention, trace: AttentionTrace, values: Tensor, lengths: list[int], bias: Tensor | None, span: slice
) -> Tensor:
    """Return values (T, H·d) behind their gate and convolution."""
    assert trace.recurrence is not None
    if trace.recurrence.in_ratio is not None:
        values = values * trace.recurrence.in_ratio[span].to(values)
    if weights.conv is None:
        return values
    bias = None if bias is None else bias.to(values)
    return convolve(values, weights.conv.weight[:, 0].to(values), bias, lengths)


def _normed_constants(weights: Attention, trace: AttentionTrace, lengths: list[int]) -> Tensor | None:
    """Return what heads make of the constant part of values that pass a norm by head, (T, H·d); None without one."""
    wide = torch.promote_types(trace.q.dtype, torch.float32)
    value, first, parts = weights.value_constant(wide), 0, []
    if value is None or trace.head_scales is None:
        return None
    value = value.view(weights.n_kv_heads, -1).repeat_interleave(weights.n_heads // weights.n_kv_heads, 0)  # (H, d)
    for length in lengths:
        span = slice(first, first + length)
        scales = trace.head_scales[span].to(wide).repeat_interleave(len(value) // weights.n_kv_heads, 1)  # (N, H)
        for begin in range(0, length, _QUERIES):
            p = span_probabilities(trace, span, slice(begin, min(begin + _QUERIES, length)), wide)  # (H, Q, N)
            worth = torch.einsum("hqn,nh->qh", p, scales)
            parts.append((worth[..., None] * value).flatten(1))
        first += length
    heads = torch.cat(parts)
    return heads if trace.out_ratio is None else heads * trace.out_ratio.to(wide)
