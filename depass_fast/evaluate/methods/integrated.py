"""Integrated gradients of tokens, the three reads together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...engine import DePass
from ..interventions import TOKENS_AT_ONCE, entering, graded_logits
from ..questions import Question

COMPLETE = 0.01  # of f(x) - f(b), in every read
FIRST = 8  # steps, which are then doubled


class IntegratedGradients(NamedTuple):
    """Scores (3, N) of the reads, and the number of steps.

    errors (3,): |Σ scores - (f(x) - f(b))| / |f(x) - f(b)|.
    """

    scores: Tensor
    errors: Tensor
    steps: int


def integrated_gradients(engine: DePass, question: Question, most: int = 256) -> IntegratedGradients:
    """Return ∫ ⟨∇f(z), dz⟩ per token, along a way from a baseline b (N, D) to the states x (N, D) that enter layer 0.

    The baseline is what enters layer 0 where every token's embedding is the vocabulary's mean: positions stay. Zero
    would not do: norms make some full-sized state of the smallest multiple of x. Special tokens stay as they are and
    score zero. The way is straight, z = b + t · (x - b). Only where the first token is not special, it goes ahead of
    the others, and its score is f's whole rise until it is there: others lean on it as a sink, and f along the straight
    way is too rough for any number of steps that one can afford.

    The steps of the trapezoid rule are doubled, no gradient is taken twice, until the scores of every read sum to
    f(x) - f(b) to 1 %, or there are ``most`` (8 at least).
    """
    x, base = _state(engine, question.ids), _state(engine, question.ids, mean_embedding(engine))
    base = torch.where(question.special[:, None], x, base)
    start = torch.cat([x[:1], base[1:]])
    with torch.no_grad(), entering(engine, torch.stack([base, start, x])):
        low, middle, high = question.values(graded_logits(engine, question.ids.expand(3, -1)))
    wanted, first, way = (high - low).cpu(), (middle - low).cpu(), x - start
    ends = torch.tensor([0.5, *[1.0] * (FIRST - 1), 0.5])
    steps, total = FIRST, _sums(engine, question, start, way, torch.arange(FIRST + 1) / FIRST, ends)
    while True:
        scores = total / steps
        scores[:, 0] += first
        errors = (scores.sum(-1) - wanted).abs() / wanted.abs().clamp_min(torch.finfo(wanted.dtype).tiny)
        if errors.max() <= COMPLETE or 2 * steps > most:
            return IntegratedGradients(scores, errors, steps)
        total += _sums(engine, question, start, way, (torch.arange(steps) + 0.5) / steps, torch.ones(steps))
        steps *= 2


def _sums(engine: DePass, question: Question, base: Tensor, way: Tensor, points: Tensor, weights: Tensor) -> Tensor:
    """Return Σ_t w_t · ⟨∇f(b + t · way), way⟩ (3, N) over ``points`` t (P,) of the ``way`` (N, D) from ``base``."""
    total, some = torch.zeros(3, len(way)), max(1, TOKENS_AT_ONCE // len(way))
    for t, weight in zip(points.split(some), weights.split(some), strict=True):
        states = (base + t.to(way)[:, None, None] * way).requires_grad_()
        with torch.enable_grad(), entering(engine, states):
            values = question.values(graded_logits(engine, question.ids.expand(len(t), -1))).sum(0)
            gradients = [torch.autograd.grad(one, states, retain_graph=i < 2)[0] for i, one in enumerate(values)]
        products = torch.stack([(g.float() * way.float()).sum(-1) for g in gradients]).cpu()  # (3, P, N)
        total += torch.einsum("rtn,t->rn", products, weight)
    return total


@torch.no_grad()
def mean_embedding(engine: DePass) -> Tensor:
    """Return the mean (E,) of what the embedding gives for every token of the vocabulary."""
    module = engine.adapter.embedding
    parts = torch.arange(module.num_embeddings, device=engine.adapter.device).split(1 << 13)
    return torch.stack([module(part).double().sum(0) for part in parts]).sum(0) / module.num_embeddings


@torch.no_grad()
def _state(engine: DePass, ids: Tensor, embedding: Tensor | None = None) -> Tensor:
    """Return what enters layer 0 (N, D), with all embeddings replaced by ``embedding`` (E,) where it is given."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        kept.append(args[0][0])

    def replace(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output if embedding is None else embedding.to(output).expand_as(output)

    handles = [
        engine.adapter.embedding.register_forward_hook(replace),
        engine.adapter.block(0).register_forward_pre_hook(keep),
    ]
    try:
        graded_logits(engine, ids[None])
    finally:
        for handle in handles:
            handle.remove()
    return kept[0]
