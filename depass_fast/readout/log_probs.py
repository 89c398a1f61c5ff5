"""The mean direction of all tokens under the model's probabilities: what a log-probability is less than a logit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapters import Adapter

_ELEMENTS = 1 << 25  # of the unembedding, and of the logits, that are held at once in the state's dtype


@dataclass(frozen=True)
class MeanToken:
    """Σ_j p_j w_j (S, D), the same of the constants (S,), and log Z = logsumexp_j logit_j (S,), at S hidden states.

    w_t - Σ_j p_j w_j, with p frozen, is the gradient of log p_t. Its product with the hidden state is
    logit_t - Σ_j p_j logit_j, which is log p_t plus the entropy of p.
    """

    vectors: Tensor
    constants: Tensor
    log_z: Tensor

    @property
    def is_finite(self) -> Tensor:
        """False (S,) where a row of the unembedding holds NaN or inf."""
        return self.vectors.isfinite().all(1) & self.constants.isfinite()

    @staticmethod
    def at(adapter: Adapter, hidden: Tensor) -> MeanToken:
        """Return the mean at normed final hidden states (S, D), in their dtype.

        One pass over the vocabulary, block by block, with a running maximum. A cap's ratio is part of w_j.
        """
        (places, width), size = hidden.shape, adapter.vocabulary_size
        block = max(1, _ELEMENTS // max(width, places))
        largest = hidden.new_full((places,), -torch.inf)
        total, constants, vectors = hidden.new_zeros(places), hidden.new_zeros(places), torch.zeros_like(hidden)
        for first in range(0, size, block):
            rows, offsets = adapter.uncapped_directions(slice(first, first + block), hidden.dtype)
            raw = hidden @ rows.T + offsets  # (S, block)
            ratio = adapter.cap_ratio(raw)
            logits = raw * ratio
            new = torch.maximum(largest, logits.amax(1))
            shrink, weights = (largest - new).exp(), (logits - new[:, None]).exp()
            total = total * shrink + weights.sum(1)
            weights *= ratio
            constants = constants * shrink + weights @ offsets
            vectors = vectors * shrink[:, None] + weights @ rows
            largest = new
        return MeanToken(vectors / total[:, None], constants / total, largest + total.log())
