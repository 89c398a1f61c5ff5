"""Integrated gradients of tokens, the three reads together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...engine import DePass
from ..interventions import TOKENS_AT_ONCE, entering, graded_logits
from ..questions import Question

COMPLETE = 0.01  # of f(x) - f(b), in every read
FIRST = 8  # steps of one length, of which some are halved


class IntegratedGradients(NamedTuple):
    """Scores (3, N) of the reads, and the number of steps.

    errors (3,): |Σ scores - (f(x) - f(b))| / |f(x) - f(b)|.
    """

    scores: Tensor
    errors: Tensor
    steps: int


def integrated_gradients(engine: DePass, question: Question, most: int = 512) -> IntegratedGradients:
    """Return ∫ ⟨∇f(z), dz⟩ per token, along a way from a baseline b (N, D) to the states x (N, D) that enter layer 0.

    The baseline is what enters layer 0 where every token's embedding is the vocabulary's mean: positions stay. Zero
    would not do: norms make some full-sized state of the smallest multiple of x. Special tokens stay as they are and
    score zero. The way is straight, z = b + t · (x - b). Only where the first token is not special, it goes ahead of
    the others, and its score is f's whole rise until it is there: others lean on it as a sink.

    The trapezoid rule is adaptive. A step is off by its own rise of f less the integral over it; the quarter of the
    steps that are most off are halved, until the scores of every read sum to f(x) - f(b) to 1 %, or there are ``most``
    steps (8 at least). f is rough in some places of the way, and smooth over most of it. A complete sum says that the
    scores are right together, not that each is right to 1 %.
    """
    x, base = _state(engine, question.ids), _state(engine, question.ids, mean_embedding(engine))
    base = torch.where(question.special[:, None], x, base)
    wide = torch.promote_types(x.dtype, torch.float32)  # in half precision points of the way would coincide
    x, base = x.to(wide), base.to(wide)
    start = torch.cat([x[:1], base[1:]])
    with torch.no_grad(), entering(engine, base[None]):
        low = question.values(graded_logits(engine, question.ids[None]))[0].cpu()
    way = x - start
    points = torch.linspace(0, 1, FIRST + 1)
    values, products = _along(engine, question, start, way, points)
    wanted, first = values[:, -1] - low, values[:, 0] - low
    scale = wanted.abs().clamp_min(torch.finfo(wanted.dtype).tiny)
    while True:
        steps = points.diff()
        parts = (products[:, 1:] + products[:, :-1]) / 2 * steps[:, None]  # (3, steps, N)
        scores = parts.sum(1)
        scores[:, 0] += first.masked_fill(question.special[0].cpu(), 0)
        missing = (values.diff() - parts.sum(-1)) / scale[:, None]  # (3, steps)
        errors, left = (scores.sum(-1) - wanted).abs() / scale, most - len(steps)
        if errors.max() <= COMPLETE or left <= 0:
            return IntegratedGradients(scores, errors, len(steps))
        worst = missing.abs().amax(0).topk(min(left, max(4, len(steps) // 4))).indices
        halves = points[worst] + steps[worst] / 2
        more = _along(engine, question, start, way, halves)
        points, order = torch.cat([points, halves]).sort()
        values, products = (torch.cat(both, 1)[:, order] for both in zip((values, products), more, strict=True))


def _along(engine: DePass, question: Question, start: Tensor, way: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Return f (3, P) and ⟨∇f, way⟩ (3, P, N) at ``points`` t (P,) of the ``way`` (N, D) from ``start``."""
    found = []
    for t in points.split(max(1, TOKENS_AT_ONCE // len(way))):
        states = (start + t.to(way)[:, None, None] * way).requires_grad_()
        with torch.enable_grad(), entering(engine, states):
            values = question.values(graded_logits(engine, question.ids.expand(len(t), -1))).T  # (3, P)
            gradients = [torch.autograd.grad(one.sum(), states, retain_graph=i < 2)[0] for i, one in enumerate(values)]
        products = torch.stack([(g.float() * way.float()).sum(-1) for g in gradients])
        found.append((values.detach().cpu(), products.cpu()))
    return torch.cat([one for one, _ in found], 1), torch.cat([one for _, one in found], 1)


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
