"""The logits of frozen attention, key by key: what is seen, what was capped, and the logit of nothing (a sink)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..trace.attention import causal_mask
from ..trace.record import AttentionTrace
from .sides import Sides


@dataclass(frozen=True)
class Logits:
    """The logits of some heads and queries of a prompt over its first K keys, and behind them that of a sink, if any.

    ``values`` (H, Q, K') are final, -inf where a query does not see a key; K' is K, or K + 1 with a sink. ``ratio``
    (H, Q, K) is scale times capped / raw, by which a product q·k counts. ``bias`` (H, 1, K) is added to keys, or None.
    """

    values: Tensor
    ratio: Tensor
    bias: Tensor | None
    has_sink: bool

    @property
    def sink(self) -> Tensor | None:
        """The logit of the sink (H, Q), or None without one."""
        return self.values[..., -1] if self.has_sink else None


def logits_of(
    sides: Sides, trace: AttentionTrace, span: slice, heads: slice, queries: Tensor, n_keys: int | None = None
) -> Logits:
    """Return the logits of ``heads`` at local positions ``queries`` (Q,) of the prompt at ``span``."""
    q, keys = sides.q[queries, heads], sides.k[:n_keys]
    which = torch.arange(sides.q.shape[1], device=q.device)[heads] // sides.groups
    k = keys[:, which]  # (K, h, d)
    raw = torch.einsum("qhd,khd->hqk", q, k) * trace.scale
    ratio = torch.full_like(raw, trace.scale)
    if trace.softcap is not None:
        ratio = ratio * torch.where(raw == 0, 1.0, capped(raw, trace) / torch.where(raw == 0, 1.0, raw))
    bias = None
    if trace.key_bias is not None:
        bias = trace.key_bias[span][: len(keys), heads].to(raw).T[:, None]
    sink = None if sides.sink is None else sides.sink[heads, None, None]
    return Logits(finished(raw, trace, queries, bias, sink), ratio, bias, sink is not None)


def capped(raw: Tensor, trace: AttentionTrace) -> Tensor:
    """Return scaled products, capped where the model caps them."""
    return raw if trace.softcap is None else trace.softcap * torch.tanh(raw / trace.softcap)


def finished(raw: Tensor, trace: AttentionTrace, queries: Tensor, bias: Tensor | None, sink: Tensor | None) -> Tensor:
    """Return the logits (..., Q, K) that scaled products ``raw`` become, with those of a ``sink`` (..., 1, 1) behind.

    ``bias`` is added to keys; keys that the ``queries`` (Q,) do not see have -inf.
    """
    values = capped(raw, trace)
    values = values if bias is None else values + bias
    values = values.masked_fill(~causal_mask(queries, raw.shape[-1], trace.window, trace.chunked), -torch.inf)
    return values if sink is None else torch.cat([values, sink.expand(*values.shape[:-1], 1)], -1)
