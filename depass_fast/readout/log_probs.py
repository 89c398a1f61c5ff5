"""The direction of a token's log-probability, with the model's probabilities frozen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters import Adapter

_ELEMENTS = 1 << 25  # of the unembedding, and of the logits, that are held at once in the state's dtype
_SUMMED = 1024  # tokens that one product sums up; longer sums lose digits


@dataclass(frozen=True)
class MeanToken:
    """The mean direction Σ_j p_j w_j of all tokens j under the model's probabilities p, at S hidden states.

    w_t - Σ_j p_j w_j, with p frozen, is the gradient of log p_t. Its product with the hidden state is
    logit_t - Σ_j p_j logit_j, which is log p_t plus the entropy of p.

    The mean is held as seen from the token ``top`` (S,), the most probable one: its direction ``vectors`` (S, D), and
    ``offsets`` (S, D), Σ_j p_j (w_j - w_top). Where the model is certain, the direction of that token's own
    log-probability is ever smaller than w_t; so it loses no digits. Of the ``constants`` (S, 2) the first are those of
    the top token, the second Σ_j p_j (c_j - c_top). ``log_z`` (S,) is logsumexp_j logit_j.
    """

    top: Tensor
    vectors: Tensor
    offsets: Tensor
    constants: Tensor
    log_z: Tensor

    @staticmethod
    def at(adapter: Adapter, hidden: Tensor, top: Tensor) -> MeanToken:
        """Return the mean at normed final hidden states (S, D), in their dtype.

        One pass over the vocabulary, block by block, with a running maximum. A cap's ratio is part of w_j.
        """
        (places, width), size, given = hidden.shape, adapter.vocabulary_size, hidden
        block = max(1, _ELEMENTS // max(width, places))
        hidden = adapter.entering_unembedding(given)
        w_top, c_top = adapter.capped_directions(top, hidden, hidden.dtype)
        logit = (w_top * hidden).sum(1) + c_top
        largest, total = logit, hidden.new_zeros(places)  # all sums are those of the other tokens
        constants, vectors = hidden.new_zeros(places), torch.zeros_like(hidden)
        for first in range(0, size, block):
            rows, offsets = adapter.uncapped_directions(slice(first, first + block), hidden.dtype)
            raw = hidden @ rows.T + offsets  # (S, block)
            ratio = adapter.cap_ratio(raw)
            logits = raw * ratio
            new = torch.maximum(largest, logits.amax(1))
            shrink, weights = (largest - new).exp(), (logits - new[:, None]).exp()
            weights = weights.masked_fill(torch.arange(first, first + len(rows), device=top.device) == top[:, None], 0)
            total = total * shrink + weights.sum(1)
            weights *= ratio
            constants = constants * shrink + weights @ offsets
            vectors = vectors * shrink[:, None] + _product(weights, rows)
            largest = new
        z = total + (logit - largest).exp()
        above, beside = (vectors - total[:, None] * w_top) / z[:, None], (constants - total * c_top) / z
        (w_top, c_top), (above, beside) = (
            adapter.pulled_back(*one, given) for one in ((w_top, c_top), (above, beside))
        )
        return MeanToken(
            top=top,
            vectors=w_top,
            offsets=above,
            constants=torch.stack([c_top, beside], 1),
            log_z=largest + z.log(),
        )

    @property
    def is_finite(self) -> Tensor:
        """False (S,) where a row of the unembedding holds NaN or inf."""
        return self.offsets.isfinite().all(1) & self.constants.isfinite().all(1)

    def subtracted(self, tokens: Tensor, vectors: Tensor, constants: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Return directions (K, D) and constants (K,) of ``tokens`` (K,), less the means ``at`` (K,) places of S."""
        is_top = tokens == self.top[at]
        above = torch.where(is_top[:, None], 0.0, vectors - self.vectors[at])
        beside = torch.where(is_top, 0.0, constants - self.constants[at, 0])
        return above - self.offsets[at], beside - self.constants[at, 1]


def _product(weights: Tensor, rows: Tensor) -> Tensor:
    """Return ``weights`` (S, V) @ ``rows`` (V, D), as the sum of the products of a few of the V at a time.

    No more than V · D elements are held in between, or S · V.
    """
    few = max(_SUMMED, len(weights))
    shape = len(rows) // few, few
    whole = shape[0] * few
    parts = weights[:, :whole].unflatten(1, shape).transpose(0, 1) @ rows[:whole].unflatten(0, shape)
    return parts.sum(0) + weights[:, whole:] @ rows[whole:]
