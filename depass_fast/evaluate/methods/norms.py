"""Norms: how much a component writes, wherever it goes."""

from __future__ import annotations

import torch
from torch import Tensor

from ...engine import DePass
from ...trace.record import Trace
from ..interventions import HEADS, NEURONS, recorded
from .base import NO_READ, NORM, PUBLISHED_NORM, TOKENS, Found, Subject, plain
from .gradients import in_blocks


def norms(subject: Subject) -> Found:
    """Return the norms of the tokens' states at the input of layer 0, and of what heads and neurons write."""
    engine, trace = subject.engine, subject.trace
    made = {
        TOKENS: lambda: trace.layers[0].resid_pre.float().norm(dim=-1),
        HEADS: lambda: head_norms(engine, subject.question.ids),
        NEURONS: lambda: neuron_norms(engine, trace),
    }
    return {kind: {(NORM, NO_READ): plain(made[kind]())} for kind in subject.kinds}


def neuron_norms(engine: DePass, trace: Trace) -> Tensor:
    """Return the norm of what every neuron writes, over the positions of a prompt: (L, I). For dense MLPs."""
    return torch.stack(
        [
            (record.mlp.act.float().norm(dim=0) * engine.adapter.layer(index).mlp.w_down.float().norm(dim=0)).cpu()
            for index, record in enumerate(trace.layers)
        ]
    ).detach()


@torch.no_grad()
def head_norms(engine: DePass, ids: Tensor) -> Tensor:
    """Return the norm of what every head writes, over the positions of ids (N,): (L, H)."""
    found = []
    for index, z in enumerate(recorded(engine, ids, HEADS)):  # (N, H, d)
        w_o = engine.adapter.attention(index).w_o.unflatten(-1, z.shape[1:]).float()
        found.append(torch.einsum("nhi,dhi->hnd", z.float(), w_o).flatten(1).norm(dim=1).cpu())
    return torch.stack(found)


@torch.no_grad()
def published_norms(subject: Subject) -> Found:
    """Return norms as the published scripts have them.

    "Heads" are blocks of the output projection's output: D dimensions in H equal parts. Neurons are read at the last
    position alone.
    """
    engine, found = subject.engine, {}
    if HEADS in subject.kinds:
        each = [
            in_blocks(engine, engine.adapter.attention(index).o.project(z.flatten(1))).float().norm(dim=(0, 2)).cpu()
            for index, z in enumerate(recorded(engine, subject.question.ids, HEADS))
        ]
        found[HEADS] = {(PUBLISHED_NORM, NO_READ): plain(torch.stack(each))}
    if NEURONS in subject.kinds:
        each = [
            (record.mlp.act[-1].float().abs() * engine.adapter.layer(index).mlp.w_down.float().norm(dim=0)).cpu()
            for index, record in enumerate(subject.trace.layers)
        ]
        found[NEURONS] = {(PUBLISHED_NORM, NO_READ): plain(torch.stack(each))}
    return found
