"""Components as logits over the whole vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from ..engine import DePass

TOKENS_AT_ONCE = 65_536  # rows of the unembedding


@torch.no_grad()
def part_logits(engine: DePass, parts: Tensor, hidden: Tensor) -> Tensor:
    """Return what components add to all logits: (M, V) float32, in host memory.

    ``parts`` (M, D) are components of the normed hidden state ``hidden`` (D,), as
    :meth:`depass_fast.DePass.decompose` returns them. A cap on the logits is frozen at its ratio. The constants of the
    unembedding are left out: they belong to `bias`. Together with them the logits sum to the model's.
    """
    adapter = engine.adapter
    parts, hidden = (x.to(adapter.unembedding_device, torch.float32) for x in (parts, hidden))
    head, found = adapter.head, []
    if head is not None:
        parts, hidden = head.pushed(parts, hidden), head(hidden)
    for first in range(0, adapter.vocabulary_size, TOKENS_AT_ONCE):
        vectors, constants = adapter.uncapped_directions(slice(first, first + TOKENS_AT_ONCE), torch.float32)
        ratio = adapter.cap_ratio(vectors @ hidden + constants)
        found.append((parts @ vectors.T * ratio).cpu())
    return torch.cat(found, 1)


def rank(logits: Tensor, token: int, among: Tensor | None = None) -> int:
    """Return the place of a token by its logit, from 1 for the largest, of all (V,) or ``among`` some tokens (A,)."""
    return 1 + int(((logits if among is None else logits[among]) > logits[token]).sum())
