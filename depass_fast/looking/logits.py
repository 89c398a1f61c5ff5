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
    values = raw
    if trace.softcap is not None:
        values = trace.softcap * torch.tanh(raw / trace.softcap)
        ratio = ratio * torch.where(raw == 0, 1.0, values / torch.where(raw == 0, 1.0, raw))
    bias = None
    if trace.key_bias is not None:
        bias = trace.key_bias[span][: len(keys), heads].to(raw).T[:, None]
        values = values + bias
    seen = causal_mask(queries, len(keys), trace.window)
    values = values.masked_fill(~seen, -torch.inf)
    if sides.sink is None:
        return Logits(values, ratio, bias, False)
    sink = sides.sink[heads, None, None].expand(-1, len(queries), -1)
    return Logits(torch.cat([values, sink], -1), ratio, bias, True)
