"""The log-probability of a token as a direction, with the model's probabilities frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..adapters import Adapter
from ..runtime.precision import full_precision
from .own import Places, check_log_z
from .targets import Directions

_ELEMENTS = 1 << 25  # of the unembedding, and of the logits, that are held at once in the state's dtype


@full_precision()
def with_log_probs(
    adapter: Adapter, directions: Sequence[Directions], places: Places, hidden: Tensor
) -> tuple[list[Directions], Tensor]:
    """Return the directions of a token at each of P ``places`` with that of its log-probability beside it.

    The latter is w_t - Σ_j p_j w_j with the probabilities p that the model has at the place's normed hidden state, a
    row of ``hidden`` (P, D): the gradient of log p_t. Its product with the hidden state is logit_t - Σ_j p_j logit_j,
    which is log p_t plus the entropy of p.

    Returns:
        K = 2 directions per place, the logit's first; the log partition functions logsumexp_j logit_j (P,).

    Raises:
        ValueError: a row of the unembedding holds NaN or inf, or the model's logits are others than those of its rows.
    """
    tokens = torch.cat([one.vectors for one in directions])
    means, mean_constants, log_z = _expected(adapter, hidden.to(tokens))
    if not (means.isfinite().all() and mean_constants.isfinite().all()):
        raise ValueError("continuation: a row of the unembedding holds NaN or inf, so that no log-probability exists.")
    check_log_z(adapter, places, hidden, tokens, log_z)
    found = [
        replace(
            one,
            vectors=torch.stack([one.vectors[0], one.vectors[0] - mean]),
            constants=torch.stack([one.constants[0], one.constants[0] - constant]),
            names=(one.names[0], f"log P({one.names[0]}), P frozen"),
            ids=(one.ids[0], None),
            contrast_ids=(None, None),
            several=True,
        )
        for one, mean, constant in zip(directions, means, mean_constants, strict=True)
    ]
    return found, log_z


def _expected(adapter: Adapter, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return Σ_j p_j w_j (P, D), the same of the constants (P,), and log Z (P,), at hidden states (P, D).

    One pass over the vocabulary, block by block, with a running maximum. A cap's ratio is part of w_j.
    """
    (places, width), size = hidden.shape, adapter.vocabulary_size
    block = max(1, _ELEMENTS // max(width, places))
    largest = hidden.new_full((places,), -torch.inf)
    total, constants, vectors = hidden.new_zeros(places), hidden.new_zeros(places), torch.zeros_like(hidden)
    for first in range(0, size, block):
        rows, offsets = adapter.uncapped_directions(slice(first, first + block), hidden.dtype)
        raw = hidden @ rows.T + offsets  # (P, block)
        ratio = adapter.cap_ratio(raw)
        logits = raw * ratio
        new = torch.maximum(largest, logits.amax(1))
        shrink, weights = (largest - new).exp(), (logits - new[:, None]).exp()
        total = total * shrink + weights.sum(1)
        weights *= ratio
        constants = constants * shrink + weights @ offsets
        vectors = vectors * shrink[:, None] + weights @ rows
        largest = new
    return vectors / total[:, None], constants / total, largest + total.log()
