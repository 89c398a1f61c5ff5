"""The oracle: DESIGN.md section 2 written down on dense (N, M, D) blocks, in any dtype. Slow and plain on purpose.

Its cost model is :mod:`.reference_cost`: whoever changes what is held here changes it there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..adapters import Attention, Branch, Mlp, Norm
from ..allocation import Allocation, Gates
from ..labels import BIAS, REST
from ..linear_rules import linear_shares
from ..state.layout import Components, Layout
from ..state.state import ComponentState
from ..trace.attention import attention_probabilities
from ..trace.constants import constant_values, values_before_activation
from ..trace.mixing import within_taps
from ..trace.record import AttentionTrace, MlpTrace
from .base import Backend
from .reference_keyed import keyed_heads


class ReferenceBackend(Backend):
    """Plain PyTorch, one prompt at a time, everything in the state's dtype."""

    name = "reference"
    jagged = False

    def aggregate_ov(
        self,
        state: ComponentState,
        weights: Attention,
        trace: AttentionTrace,
        queries: Layout | None = None,
        source: ComponentState | None = None,
    ) -> ComponentState:
        dtype, layout = state.rows.dtype, state.layout
        out = ComponentState(state.rows, layout, state.layer)
        if queries is not None:
            out = ComponentState(state.rows.new_zeros(queries.n_rows, state.rows.shape[1]), queries, state.layer)
        bias, value_constant = layout.index(BIAS), weights.value_constant(dtype)
        for prompt in range(len(layout.components)):
            where = torch.from_numpy(layout.packed[layout.segments(prompt)]).to(state.device)
            read = torch.from_numpy(out.layout.local[out.layout.segments(prompt)]).to(state.device)
            x = state.block(prompt)  # (N, M, D)
            of_values = x if source is None else source.block(prompt)
            values = (
                _frozen_norm(weights.norm, of_values, trace.resid[where]) @ weights.w_v.to(dtype).T
            )  # (N, M, Hkv·d)
            if trace.keyed is not None:
                y = keyed_heads(weights, trace, values, where, read) @ weights.w_o.to(dtype).T
                out.set_block(prompt, x[read] + _written(weights, y, None, trace.out_scale, where[read], bias))
                continue
            if trace.recurrence is not None:
                alive = (of_values != 0).any(-1)
                share = partial(_activation_shared, weights, trace, layout, prompt, alive)
                mixed = _recurrence(weights, trace, values, where, bias, value_constant, share)[read]
                y = mixed @ weights.w_o.to(dtype).T
                y = _written(weights, y, weights.o.bias, trace.out_scale, where[read], bias)
                out.set_block(prompt, x[read] + y)
                continue
            if bias is not None and value_constant is not None:
                values[:, bias] += value_constant
            if trace.latent_scale is not None:
                values = values * trace.latent_scale[where].to(dtype)[:, None, None]
            if trace.value_ratio is not None:
                values = values * trace.value_ratio[where].to(dtype)[:, None]
            values = values.unflatten(-1, (weights.n_kv_heads, weights.head_dim))
            if trace.head_scales is not None:
                values = values * trace.head_scales[where].to(dtype)[:, None, :, None]
            values = values.repeat_interleave(weights.n_heads // weights.n_kv_heads, dim=2)  # (N, M, H, d)
            p = attention_probabilities(trace, where, read, dtype)  # (H, Q, N)
            mixed = torch.einsum("hqk,kmhd->qmhd", p, values).flatten(2)
            if trace.out_ratio is not None:
                mixed = mixed * trace.out_ratio[where[read]].to(dtype)[:, None]
            y = mixed @ weights.w_o.to(dtype).T  # (Q, M, D)
            out.set_block(prompt, x[read] + _written(weights, y, weights.o.bias, trace.out_scale, where[read], bias))
        return out

    def allocate_mlp(
        self,
        state: ComponentState,
        weights: Mlp,
        trace: MlpTrace,
        allocation: Allocation,
        source: ComponentState | None = None,
    ) -> ComponentState:
        dtype, layout = state.rows.dtype, state.layout
        bias = layout.index(BIAS)
        for prompt in range(len(layout.components)):
            where = torch.from_numpy(layout.packed[layout.segments(prompt)]).to(state.device)
            x = (source or state).block(prompt)  # (N, M, D)
            if allocation.linear_rule is None:
                shares = _allocated(allocation, weights, trace, layout, prompt, x)
            else:
                shares = _linearly(allocation.linear_rule, weights, trace, where, x, bias)
            y = shares @ weights.w_down.to(dtype).T
            y = _written(weights, y, trace.constant(weights, where, dtype), trace.out_scale, where, bias)
            state.set_block(prompt, y + (x if source is None else state.block(prompt)))
        return state

    def read_out(self, state: ComponentState, norm: Norm | None, resid: Tensor, directions: Tensor) -> Tensor:
        rows = state.rows
        if norm is not None:
            where = torch.from_numpy(state.layout.packed[state.layout.row_segments()]).to(rows.device)
            rows = _frozen_norm(norm, rows, resid[where])
        return rows @ directions.to(rows.dtype).T


def _recurrence(
    weights: Attention,
    trace: AttentionTrace,
    values: Tensor,
    where: Tensor,
    bias: int | None,
    constant: Tensor | None,
    share: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return what the heads of a recurrence, and of a softmax beside it, give for values (N, M, H·d).

    ``share`` gives the shares (N, M, H·d) of the values' activation, where that is not frozen at its ratio.
    """
    frozen, dtype, conv = trace.recurrence, values.dtype, weights.conv
    assert frozen is not None
    if bias is not None and constant is not None:
        values[:, bias] += constant
    if frozen.in_ratio is not None:
        values = values * frozen.in_ratio[where].to(dtype)[:, None]
    if conv is not None:
        values = _convolved(values, conv.weight[:, 0].to(dtype))
        if bias is not None and conv.bias is not None:
            values[:, bias] += conv.bias.to(dtype)
    if trace.value_rule is not None:
        values = share(values)
    elif trace.value_ratio is not None:
        values = values * trace.value_ratio[where].to(dtype)[:, None]
    values = values.unflatten(-1, (weights.n_heads, -1))  # (N, M, H, d)
    looking, parts = trace if frozen.decay is None else trace.beside, []
    beside = 0  # the first heads, which have a softmax
    if looking is not None:
        p = attention_probabilities(looking, where, torch.arange(len(where), device=where.device), dtype)
        beside = len(p)
        parts.append(torch.einsum("hqk,kmhd->qmhd", p, values[:, :, :beside]))
    if frozen.decay is not None:
        parts.append(_recurred(trace, values[:, :, beside:], where))
    out = torch.cat(parts, 2).flatten(2)
    out = out if trace.out_ratio is None else out * trace.out_ratio[where].to(dtype)[:, None]
    if bias is not None and trace.out_constant is not None:
        out[:, bias] += trace.out_constant[where].to(dtype)
    return out


def _recurred(trace: AttentionTrace, values: Tensor, where: Tensor) -> Tensor:
    """Return what a recurrence makes of shaped values (N, M, H, d), position by position."""
    frozen, dtype, heads = trace.recurrence, values.dtype, values.shape[2]
    assert frozen is not None and frozen.decay is not None
    q, k, decay = (_of_heads(x[where].to(dtype), heads) for x in (trace.q, trace.k, frozen.decay))
    decay = decay if frozen.rates is None else decay * frozen.rates.to(dtype)
    write = values.new_ones(len(values), heads) if frozen.write is None else frozen.write[where].to(dtype)
    state, out = values.new_zeros(*values.shape[1:3], k.shape[2], values.shape[3]), torch.empty_like(values)
    for t, x in enumerate(values):  # x (M, H, d), state (M, H, n, d)
        if frozen.own is not None:
            out[t] = torch.einsum("mhnd,hn->mhd", state, q[t]) + x * frozen.own[where[t]].to(dtype)[:, None]
        state = state * decay[t].exp()[..., None]
        if frozen.corrects:
            x = x - torch.einsum("mhnd,hn->mhd", state, k[t])
        state = state + torch.einsum("hn,mhd->mhnd", k[t], x * write[t][:, None])
        out[t] = out[t] if frozen.own is not None else torch.einsum("mhnd,hn->mhd", state, q[t])
    return out if frozen.skip is None else out + values * frozen.skip.to(dtype)[:, None]


def _convolved(values: Tensor, taps: Tensor) -> Tensor:
    """Return values (N, M, C) convolved along the positions, with nothing before the first: taps (C, K)."""
    out = torch.zeros_like(values)
    for back in range(min(taps.shape[1], len(values))):
        out[back:] += values[: len(values) - back] * taps[:, -1 - back]
    return out


def _activation_shared(
    weights: Attention, trace: AttentionTrace, layout: Layout, prompt: int, alive: Tensor, c: Tensor
) -> Tensor:
    """Return the shares (N, M, C) of the activation of values in front of it, ``c`` (N, M, C), under a rule.

    A component takes part where it is ``alive`` (N, M) at a position that the convolution reads.
    """
    segments, components, bias = layout.segments(prompt), layout.components[prompt], layout.index(BIAS)
    span = slice(int(layout.packed[segments][0]), int(layout.packed[segments][-1]) + 1)
    total, constant = values_before_activation(weights, trace, span), None
    if bias is not None:
        constant = constant_values(weights, trace, [len(c)], span)
    positions = torch.from_numpy(layout.local[segments]).to(c.device)
    gates = Gates(
        values=c,
        total=total.to(c.dtype),
        alive=within_taps(alive, weights),
        excluded=_excluded(components, positions),
        positions=positions,
        rest=layout.index(REST),
        bias=bias,
        constant=None if constant is None else (constant != 0).any(0).to(c.dtype),
    )
    assert trace.value_ratio is not None
    act = total * trace.value_ratio[span].to(total)
    return trace.value_rule.weights(gates) * act.to(c.dtype)[:, None]


def _of_heads(x: Tensor, heads: int) -> Tensor:
    """Return (N, Hx, n) of groups of heads as that of every head."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _frozen_norm(norm: Norm | None, x: Tensor, resid: Tensor) -> Tensor:
    """γ ⊙ x · s with s of the hidden states ``resid`` (N, D); ``x`` is (N, ..., D)."""
    return x if norm is None else norm.apply(x, norm.scale(resid.to(x.dtype)))


def _projected(
    weight: Tensor, constant: Tensor | None, norm: Norm | None, x: Tensor, resid: Tensor, bias: int | None
) -> Tensor:
    """Return what a projection reads of every component, its constant in that of `bias`: (N, M, D) -> (N, M, I)."""
    y = _frozen_norm(norm, x, resid) @ weight.to(x.dtype).T
    if bias is not None and constant is not None:
        y[:, bias] += constant
    return y


def _allocated(allocation: Allocation, weights: Mlp, trace: MlpTrace, layout: Layout, prompt: int, x: Tensor) -> Tensor:
    """Return the shares (N, M, I) of components ``x`` (N, M, D) that compete for a neuron's activation."""
    segments, components, bias = layout.segments(prompt), layout.components[prompt], layout.index(BIAS)
    where, local = (torch.from_numpy(at[segments]).to(x.device) for at in (layout.packed, layout.local))
    constant, recorded = weights.gate_constant(x.dtype), trace.rows(where)
    gates = Gates(
        values=_projected(weights.w_gate, constant, weights.norm, _weighted(trace, x, where), trace.resid[where], bias),
        total=trace.gate[recorded].to(x.dtype),
        alive=(x != 0).any(-1),
        excluded=_excluded(components, local),
        positions=local,
        rest=layout.index(REST),
        bias=bias,
        constant=None if bias is None else constant,
    )
    return allocation.weights(gates) * trace.act[recorded].to(x.dtype)[:, None]


def _excluded(components: Components, positions: Tensor) -> Tensor:
    """Return which components are special tokens away from their own position: (N, M)."""
    births, excluded = (torch.from_numpy(a).to(positions.device) for a in (components.births, components.excluded))
    return excluded & (births != positions[:, None])


def _weighted(trace: MlpTrace, x: Tensor, where: Tensor) -> Tensor:
    """Return components (N, M, D) times the factor of what an expert reads."""
    weight = trace.input_weight
    return x if weight is None else x * weight[trace.rows(where)].to(x)[:, None, None]


def _linearly(rule: str, weights: Mlp, trace: MlpTrace, where: Tensor, x: Tensor, bias: int | None) -> Tensor:
    """Return the shares (N, M, I) that a linear rule gives components ``x`` (N, M, D)."""
    c = linear_shares(rule, weights, trace, trace.rows(where), x.dtype)
    read = (weights.norm, _weighted(trace, x, where), trace.resid[where], bias)
    shares = _projected(weights.w_gate, weights.gate_constant(x.dtype), *read) * c.gate[:, None]
    if c.up is not None:
        shares += _projected(weights.w_up, weights.up_constant(x.dtype), *read) * c.up[:, None]
    if bias is not None and c.constant is not None:
        shares[:, bias] += c.constant
    return shares


def _written(
    weights: Branch, y: Tensor, constant: Tensor | None, out_scale: Tensor | None, where: Tensor, bias: int | None
) -> Tensor:
    """Return what outputs ``y`` (N, M, D) at packed positions ``where`` add to the stream; constants go to `bias`."""
    if bias is not None and constant is not None:
        y[:, bias] += constant.to(y.dtype)
    if weights.output is not None:
        y = weights.output.apply(y, None if out_scale is None else out_scale[where])
        if bias is not None and weights.output.bias is not None:
            y[:, bias] += weights.output.bias.to(y.dtype)
    return y * weights.factor
