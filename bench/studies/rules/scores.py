"""The scores of all neurons, all heads and all tokens of one prompt, by every method, in a logit and in its log P."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from depass_fast import ApproximationWarning, DePass, Heads, LogProb, Neurons, Tokens
from depass_fast.evaluate.methods.gradients import gradient_times_activation
from depass_fast.evaluate.methods.norms import head_norms, neuron_norms
from depass_fast.linear_rules import LINEAR_RULES
from depass_fast.options import Adjoint

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
    patched = gradient_times_activation(engine, ids, both_reads(target))
    add(GRADIENT, patched["neurons"], patched["heads"], patched["tokens"])
    found.neurons[NORM, NO_READ], found.heads[NORM, NO_READ] = neuron_norms(engine, trace), head_norms(engine, ids)
    draw = torch.Generator().manual_seed(seed)
    for kind, of_read in ((found.neurons, neurons), (found.heads, heads), (found.tokens, tokens)):
        kind[RANDOM, NO_READ] = torch.rand(of_read.shape[1:], generator=draw)
    return found


def both_reads(target: int) -> Callable[[Tensor], Tensor]:
    """Return what makes the numbers of :data:`READS` (2,) of logits (V,)."""
    return lambda logits: torch.stack([logits[target], logits.log_softmax(-1)[target]])
