"""A mixture of attention heads in the recorded forward pass: what the chosen heads do, as that of all heads.

A head that is not chosen at a position has a query of zeros there, and probabilities of zero: the router's weight is in
the rows of P (`row_sum` of :class:`depass_fast.trace.record.AttentionTrace`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapters import Adapter

WEIGHTS, CHOSEN = "head_weights", "chosen_heads"  # the names under which a router's decisions are recorded


@dataclass(frozen=True)
class HeadChoice:
    """The experts of heads, of ``count``, that T positions are sent to: ``weights`` and ``chosen`` (T, K)."""

    weights: Tensor
    chosen: Tensor
    count: int

    @staticmethod
    def of(adapter: Adapter, index: int, record: dict[str, Any], n: int) -> HeadChoice | None:
        """Return the choice of layer ``index`` at the last ``n`` positions; None where all positions have all heads."""
        declared = adapter.kind(index).head_experts
        if declared is None:
            return None
        return HeadChoice(record[WEIGHTS][-n:], record[CHOSEN][-n:], declared.count)

    def spread(self, x: Tensor) -> Tensor:
        """Return numbers (T, K·Hkv, ...) of the chosen heads as those of all heads, (T, Hkv·E, ...): else zeros."""
        x = x.unflatten(1, (self.chosen.shape[1], -1)).transpose(1, 2)  # (T, Hkv, K, ...)
        out = x.new_zeros(*x.shape[:2], self.count, *x.shape[3:])
        chosen = self.chosen.view(len(x), 1, -1, *[1] * (x.ndim - 3)).expand_as(x)
        return out.scatter_(2, chosen, x).flatten(1, 2)

    def once(self, x: Tensor) -> Tensor:
        """Return keys or values (T, K·Hkv, d), which are repeated for every choice, once: (T, Hkv, d)."""
        return x[:, : x.shape[1] // self.chosen.shape[1]]

    def row_sums(self, heads: int) -> Tensor:
        """Return the router's weights as sums of P's rows, (T, Hkv·E) in float32 or wider, of K·Hkv ``heads``."""
        weights = self.weights.to(torch.promote_types(self.weights.dtype, torch.float32))
        return self.spread(weights.repeat_interleave(heads // weights.shape[1], 1))


def of_all_heads(choice: HeadChoice | None, q: Tensor, k: Tensor) -> dict[str, Tensor]:
    """Return what is recorded of an attention call's queries (T, H', d) and keys (T, Hkv', d), by its name."""
    if choice is None:
        return {"q": q, "k": k}
    return {"q": choice.spread(q), "k": choice.once(k), "row_sum": choice.row_sums(q.shape[1])}


def checked_heads(choice: HeadChoice | None, v: Tensor, given: Tensor) -> dict[str, Tensor]:
    """Return what is compared of values (T, Hkv', d) and of what the heads of a call give (T, H', d), by its name."""
    if choice is None:
        return {"values": v, "attended": given}
    weighed = choice.spread(given) * choice.row_sums(given.shape[1])[..., None].to(given)
    return {"values": choice.once(v), "attended": weighed}
