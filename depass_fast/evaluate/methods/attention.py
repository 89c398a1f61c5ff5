"""Attention weights as scores of tokens: rollout, and the last layer's."""

from __future__ import annotations

import torch
from torch import Tensor

from ...trace.attention import attention_probabilities
from .base import LAST_ATTENTION, NO_READ, ROLLOUT, TOKENS, Found, NotPossibleError, Subject, plain


def attention_weights(subject: Subject) -> Found:
    """Return attention rollout, and the last layer's attention from the last position, the mean over its heads.

    Raises:
        NotPossibleError: a layer has no softmax attention.
    """
    if any(one.attention is None or one.attention.is_mixed for one in subject.trace.layers):
        raise NotPossibleError("layers of the model have no attention probabilities.")
    every = torch.arange(len(subject.question.ids))
    layers = [one.attention for one in subject.trace.layers]
    means = [
        attention_probabilities(one, every.to(one.q.device), every.to(one.q.device), torch.float32).mean(0).cpu()
        for one in layers
    ]
    last = means[-1][-1]
    return {TOKENS: {(ROLLOUT, NO_READ): plain(rollout(means)[-1]), (LAST_ATTENTION, NO_READ): plain(last)}}


def rollout(probabilities: list[Tensor]) -> Tensor:
    """Return Π_l A_l, the last layer on the left, with A = ½ P + ½ I and rows that sum to one: (N, N).

    ``probabilities`` are P (N, N) of the layers, means over heads (Abnar and Zuidema 2020).
    """
    found = torch.eye(len(probabilities[0]))
    for p in probabilities:
        mixed = 0.5 * p + 0.5 * torch.eye(len(p))
        found = (mixed / mixed.sum(-1, keepdim=True)) @ found
    return found
