"""The scores of all neurons, all heads and all tokens of one prompt, by every method, in a logit and in its log P."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from depass_fast import ApproximationWarning, DePass, Heads, LogProb, Neurons, Tokens
from depass_fast.linear_rules import LINEAR_RULES
from depass_fast.options import Adjoint

from ...baselines.neuron_methods import inputs_and_gradients
from ..faithfulness import neuron_norms

READS, NO_READ = ("logit", "log-prob"), "-"  # norms and random numbers know of no target
SOFTMAX, GRADIENT, NORM, RANDOM = "softmax", "gradient × activation", "norm", "random"
REFINED = 200  # neurons that the adjoint sweep of the softmax rule refines


@dataclass(frozen=True)
class Scores:
    """Scores by (method, read): ``neurons`` (L, I), ``heads`` (L, H), ``tokens`` (N,) each."""

    neurons: dict[tuple[str, str], Tensor]
    heads: dict[tuple[str, str], Tensor]
    tokens: dict[tuple[str, str], Tensor]


def scores_of(engine: DePass, ids: Tensor, target: int, seed: int) -> Scores:
    """Return every method's scores of a prompt's components; ids (N,)."""
    trace, targets = engine.trace(ids), [target, LogProb(target)]
    found = Scores({}, {}, {})

    def add(method: str, neurons: Tensor, heads: Tensor, tokens: Tensor) -> None:
        for kind, scores in ((found.neurons, neurons), (found.heads, heads), (found.tokens, tokens)):
            kind.update({(method, read): of_read for read, of_read in zip(READS, scores, strict=True)})

    for rule in LINEAR_RULES:
        book = engine.ledger(trace, targets, rule=rule)
        add(rule, book.neurons().scores, book.heads().scores, book.tokens().scores[:, : len(ids)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ApproximationWarning)
        neurons = engine.attribute(
            trace, Neurons(layers="all"), targets, method=Adjoint(refine=REFINED, sample=0)
        ).scores
    heads = engine.attribute(trace, Heads(layers="all"), targets, method="exact").scores
    tokens = engine.attribute(trace, Tokens(), targets, method="exact").scores[:, : len(ids)]
    add(SOFTMAX, neurons, heads, tokens)
    patched, norms = gradient_times_activation(engine, ids, target)
    add(GRADIENT, *patched)
    found.neurons[NORM, NO_READ], found.heads[NORM, NO_READ] = neuron_norms(engine, trace), norms
    draw = torch.Generator().manual_seed(seed)
    for kind, of_read in ((found.neurons, neurons), (found.heads, heads), (found.tokens, tokens)):
        kind[RANDOM, NO_READ] = torch.rand(of_read.shape[1:], generator=draw)
    return found


def gradient_times_activation(engine: DePass, ids: Tensor, target: int) -> tuple[list[Tensor], Tensor]:
    """Attribution patching by autograd, of both reads, and the norm of what every head writes.

    Returns the scores of neurons (2, L, I), heads (2, L, H) and tokens (2, N), and the norms (L, H).
    """
    adapter, layers = engine.adapter, range(engine.adapter.n_layers)
    parts = [adapter.module(index, part) for index in layers for part in ("o_proj", "down_proj")]

    def reads() -> list[Tensor]:
        logits = engine.model(ids[None], use_cache=False, logits_to_keep=1).logits[0, -1].float()
        return [logits[target], logits.log_softmax(-1)[target]]

    inputs, gradients = inputs_and_gradients([adapter.block(0), *parts], reads)
    products = [[x * g for x, g in zip(inputs, of_read, strict=True)] for of_read in gradients]
    tokens = torch.stack([each[0].sum(-1) for each in products])
    by_column = torch.stack([torch.stack([x.sum(0) for x in each[1::2]]) for each in products])  # (2, L, H·d)
    neurons = torch.stack([torch.stack([x.sum(0) for x in each[2::2]]) for each in products])
    n_heads, norms = adapter.attention(0).n_heads, []
    for index, z in zip(layers, inputs[1::2], strict=True):
        z, w_o = (x.unflatten(-1, (n_heads, -1)) for x in (z, adapter.attention(index).w_o.detach()))
        norms.append(torch.einsum("nhi,dhi->hnd", z, w_o).flatten(1).norm(dim=1))
    return [neurons, by_column.unflatten(-1, (n_heads, -1)).sum(-1), tokens], torch.stack(norms)
