"""Leave-one-out: the fall of the target without a token, or without a head."""

from __future__ import annotations

import torch
from torch import Tensor

from ..interventions import HEADS, logits_after, masked_logits, next_logits, replacement_id, widths
from .base import DELETED, REPLACED, TOKENS, Found, NotPossibleError, Subject, by_read


@torch.no_grad()
def leave_one_out(subject: Subject) -> Found:
    """Return by how much each target falls without a token, or with a head at zero at every position.

    Tokens are deleted from the prompt, or replaced by :func:`depass_fast.evaluate.interventions.replacement_id`.

    Raises:
        NotPossibleError: a token is to be deleted from a prompt of one.
    """
    question, engine, found = subject.question, subject.engine, {}
    whole = question.values(next_logits(engine, question.ids[None]))  # (1, 3)
    if TOKENS in subject.kinds:
        found[TOKENS] = {}
        for method, rows in (
            (DELETED, _without_each(question.ids)),
            (REPLACED, _with_filler(question.ids, replacement_id(engine))),
        ):
            if method in subject.methods:
                if not rows.shape[1]:
                    raise NotPossibleError("nothing is left of a prompt of one token without it.")
                falls = whole - question.values(logits_after(engine, rows))
                found[TOKENS] |= by_read(method, falls.T)
    if HEADS in subject.kinds and DELETED in subject.methods:
        layers, heads = subject.n_layers, widths(engine, HEADS)[0]
        masks = torch.eye(layers * heads, dtype=torch.bool).view(-1, layers, heads)
        falls = whole - question.values(masked_logits(engine, question.ids, masks, HEADS))
        found[HEADS] = by_read(DELETED, falls.T.unflatten(-1, (layers, heads)))
    return found


def _without_each(ids: Tensor) -> Tensor:
    """Return ids (N,) without one of them after the other: (N, N - 1)."""
    n = len(ids)
    others = ~torch.eye(n, dtype=torch.bool, device=ids.device)
    return ids.expand(n, -1)[others].view(n, n - 1)


def _with_filler(ids: Tensor, filler: int) -> Tensor:
    """Return ids (N,) with a filler in the place of one of them after the other: (N, N)."""
    return ids.expand(len(ids), -1).masked_fill(torch.eye(len(ids), dtype=torch.bool, device=ids.device), filler)
