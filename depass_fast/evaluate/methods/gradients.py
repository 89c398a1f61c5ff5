"""Gradient × activation, which is attribution patching to zero: all kinds and reads from one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ...engine import DePass
from ..interventions import HEADS, NEURONS, PARTS, graded_logits, readers
from .base import (
    GRADIENT,
    GRADIENT_INPUT,
    KINDS,
    PUBLISHED_GRADIENT,
    TOKENS,
    Found,
    NotPossibleError,
    Subject,
    by_read,
)


def gradients(subject: Subject) -> Found:
    """Return gradient × input of tokens, at the input of layer 0, and gradient × activation of heads and neurons.

    A head's activation is what the output projection reads of it.
    """
    scores = gradient_times_activation(subject.engine, subject.question.ids, subject.question.values, subject.kinds)
    return {kind: by_read(GRADIENT_INPUT if kind == TOKENS else GRADIENT, one) for kind, one in scores.items()}


def gradient_times_activation(
    engine: DePass, ids: Tensor, read: Callable[[Tensor], Tensor], kinds: Sequence[str] = KINDS
) -> dict[str, Tensor]:
    """Return attribution patching to zero by autograd, for every number that ``read`` makes of the logits (V,): (R,).

    Sums over positions: tokens (R, N), heads (R, L, H), neurons (R, L, I).
    """
    adapter, parts = engine.adapter, [kind for kind in PARTS if kind in kinds]
    by_layer = zip(*(readers(engine, kind) for kind in parts), strict=True)  # in the order in which they run
    modules = [adapter.block(0), *(module for layer in by_layer for module in layer)]
    inputs, found = inputs_and_gradients(modules, lambda: list(read(graded_logits(engine, ids[None])[0])))
    products = [torch.stack([g[i] for g in found]).float() * x.float() for i, x in enumerate(inputs)]  # (R, N, W) each
    scores = {TOKENS: products[0].sum(-1)}
    for number, kind in enumerate(parts):
        scores[kind] = torch.stack([x.sum(1) for x in products[1 + number :: len(parts)]], 1)
    if HEADS in scores:
        scores[HEADS] = scores[HEADS].unflatten(-1, (adapter.attention(0).n_heads, -1)).sum(-1)
    return {kind: scores[kind] for kind in kinds}


def published_gradients(subject: Subject) -> Found:
    """Return gradient × activation as the published scripts have it.

    "Heads" are blocks of the output projection's output: D dimensions in H equal parts, gradient × output there.
    Neurons are read at the last position alone.
    """
    engine, found = subject.engine, {}
    if HEADS in subject.kinds:
        outputs, gradients = _at_outputs(subject)
        products = [
            torch.stack([(x * g).sum(0) for x, g in zip(outputs, each, strict=True)])  # (L, D)
            for each in gradients
        ]
        found[HEADS] = by_read(PUBLISHED_GRADIENT, [in_blocks(engine, x).sum(-1) for x in products])
    if NEURONS in subject.kinds:
        inputs, gradients = inputs_and_gradients(readers(engine, NEURONS), lambda: _values(subject))
        found[NEURONS] = by_read(
            PUBLISHED_GRADIENT,
            [torch.stack([x[-1] * g[-1] for x, g in zip(inputs, each, strict=True)]) for each in gradients],
        )
    return found


def in_blocks(engine: DePass, x: Tensor) -> Tensor:
    """Return x (..., D) cut into as many equal blocks as there are heads: (..., H, D/H), as the published scripts do.

    Raises:
        NotPossibleError: D is no multiple of H.
    """
    heads, width = engine.adapter.attention(0).n_heads, x.shape[-1]
    if width % heads:
        raise NotPossibleError(f"the hidden size {width} is no multiple of {heads} heads.")
    return x.unflatten(-1, (heads, -1))


def _values(subject: Subject) -> list[Tensor]:
    return list(subject.question.values(graded_logits(subject.engine, subject.question.ids[None])[0]))


def _at_outputs(subject: Subject) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Return the outputs (N, D) of the output projections, and the gradients of every read there."""
    modules, kept = readers(subject.engine, HEADS), []

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        kept.append(output)

    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_hook(keep).remove)
        _, gradients = inputs_and_gradients(modules[:1], lambda: _values(subject), kept)
    return [x[0].detach() for x in kept], [each[1:] for each in gradients]


def inputs_and_gradients(
    modules: Sequence[nn.Module], read: Callable[[], Sequence[Tensor]], others: Sequence[Tensor] = ()
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Return the inputs (N, W) of modules in a forward pass of one prompt, and the gradients of each number read of it.

    ``read`` takes the forward pass. The graph begins at the input of the first of ``modules``, in the order in which
    they run: nothing before it is kept for the backward pass. ``others`` are further tensors (1, N, W) of that graph,
    filled while ``read`` runs: their gradients come behind those of the inputs.
    """
    kept: dict[int, Tensor] = {}

    def keep(number: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            kept[number] = args[0].detach().requires_grad_() if number == 0 else args[0]
            return (kept[number], *args[1:])

        return hook

    with torch.enable_grad(), ExitStack() as hooks:
        for number, module in enumerate(modules):
            hooks.callback(module.register_forward_pre_hook(keep(number)).remove)
        numbers = read()
        inputs = [kept[number] for number in range(len(modules))]
        gradients = [
            torch.autograd.grad(number, [*inputs, *others], retain_graph=i < len(numbers) - 1)
            for i, number in enumerate(numbers)
        ]
    return [x.detach().flatten(0, -2) for x in inputs], [[g.flatten(0, -2) for g in each] for each in gradients]
