"""The model run on other tokens, or without some of its heads or neurons. Nothing outlives the call."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..engine import DePass
from ..trace import again

HEADS, NEURONS = "heads", "neurons"
PARTS = {HEADS: "o_proj", NEURONS: "down_proj"}  # the module whose input they are
TOKENS_AT_ONCE = 1024  # of all prompts that run together
FILLERS = (" ", "_", ".")


@torch.no_grad()
def next_logits(engine: DePass, ids: Tensor) -> Tensor:
    """Return the logits (B, V) of the next token after ids (B, N) in float32, in one forward pass."""
    return graded_logits(engine, ids)


def graded_logits(engine: DePass, ids: Tensor) -> Tensor:
    """:func:`next_logits` as functions of what hooks put into the forward pass, wherever gradients are on."""
    return again.next_logits(engine.adapter, ids).float()


def logits_after(engine: DePass, rows: Tensor) -> Tensor:
    """Return the logits (B, V) of the next token after each of many rows of ids (B, N), some of them at a time."""
    return torch.cat([next_logits(engine, part) for part in _parts(rows, rows.shape[1])])


def log_probs_after(engine: DePass, rows: Sequence[tuple[int, ...]], token: int) -> dict[tuple[int, ...], float]:
    """Return log P(``token``) behind each of ``rows`` of ids, which may be of any lengths; equal rows run once."""
    return values_after(engine, rows, lambda logits: logits.log_softmax(-1)[:, token])


def values_after(
    engine: DePass, rows: Sequence[tuple[int, ...]], read: Callable[[Tensor], Tensor]
) -> dict[tuple[int, ...], Any]:
    """Return what ``read`` makes of the logits (B, V) behind ``rows`` of ids, a value or a list of values of each.

    Rows may be of any lengths; equal ones run once.
    """
    found: dict[tuple[int, ...], Any] = {}
    for part in batches(rows):
        found |= zip(part, read(next_logits(engine, torch.tensor(part))).tolist(), strict=True)
    return found


def batches(rows: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Yield the rows of ids, equal ones once, in batches of one length that run together."""
    by_length: dict[int, list[tuple[int, ...]]] = defaultdict(list)
    for row in dict.fromkeys(rows):
        by_length[len(row)].append(row)
    for length, same in by_length.items():
        yield from _parts(same, length)


def replacement_id(engine: DePass) -> int:
    """Return the token that stands for one that is taken out and leaves its place: the first of a space, "_" and ".".

    It is the first of these texts that is one token of the engine's tokenizer, and no special one: a space nearly
    everywhere. A special token would do more than leave a gap: models have seen what comes before it end there.

    Raises:
        ValueError: the engine has no tokenizer, or none of these texts is one token of it.
    """
    tokenizer: Any = engine.tokenizer
    if tokenizer is None:
        raise ValueError("tokenizer: the filler of a replaced token is a text; give DePass(model, tokenizer).")
    for text in FILLERS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) == 1 and ids[0] not in tokenizer.all_special_ids:
            return ids[0]
    raise ValueError(f"tokenizer: none of {', '.join(map(repr, FILLERS))} is one token of it, to replace others by.")


def masked_logits(engine: DePass, ids: Tensor, masks: Tensor, kind: str, values: Tensor | None = None) -> Tensor:
    """Return the logits (B, V) of the next token after ids (N,) under each of ``masks`` (B, L, W) bool.

    Where a mask is True, the output of a head, or the activation of a neuron, is zero at every position; with
    ``values`` (L, N, W, d) it is what they hold (d: a head's value dimension, 1 for neurons). ``kind`` is "heads" or
    "neurons".

    Raises:
        ValueError: ``kind`` is "neurons", and the model is a mixture of experts; it is "heads", and a router chooses
            among these.
    """
    check_maskable(engine, kind)
    found = []
    for part in _parts(masks, len(ids)):
        with ExitStack() as undo:
            for index, module in enumerate(readers(engine, kind)):
                hook = _masking(part[:, index], None if values is None else values[index])
                undo.callback(module.register_forward_pre_hook(hook).remove)
            found.append(next_logits(engine, ids.expand(len(part), -1)))
    return torch.cat(found)


def zeroed_logits(engine: DePass, ids: Tensor, states: Tensor, off: Tensor) -> Tensor:
    """Return the logits (B, V) of the next token after ids (N,), without what some tokens bring into layer 0.

    ``states`` (N, D) are what all of them bring; it is zero where a mask of ``off`` (B, N) bool is True.
    """
    found = []
    for part in _parts(off, len(ids)):
        with entering(engine, states.masked_fill(part[..., None].to(states.device), 0)):
            found.append(next_logits(engine, ids.expand(len(part), -1)))
    return torch.cat(found)


@contextmanager
def entering(engine: DePass, states: Tensor) -> Iterator[None]:
    """Have ``states`` (B, N, D) enter layer 0 in the forward passes inside."""

    def enter(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (states.to(args[0]), *args[1:])

    handle = engine.adapter.block(0).register_forward_pre_hook(enter)
    try:
        yield
    finally:
        handle.remove()


def check_maskable(engine: DePass, kind: str) -> None:
    """Raise ValueError where components of this ``kind`` cannot be masked in this model."""
    if kind == NEURONS and any(engine.adapter.is_mixture(index) for index in range(engine.adapter.n_layers)):
        raise ValueError("model: it is a mixture of experts, whose neurons cannot be masked; take heads or tokens.")
    if kind == HEADS and any(engine.adapter.kind(index).head_experts for index in range(engine.adapter.n_layers)):
        raise ValueError("model: a router chooses among its heads, which cannot be masked one by one; take tokens.")
    if any(engine.adapter.module(index, PARTS[kind]) is None for index in range(engine.adapter.n_layers)):
        raise ValueError(f"model: some of its layers have no {kind}, which cannot be masked there; take tokens.")


def recorded(engine: DePass, ids: Tensor, kind: str) -> list[Tensor]:
    """Return what :func:`masked_logits` would replace, as the model computes it on ids (N,): (N, W, d) per layer."""
    check_maskable(engine, kind)
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0].detach().flatten(0, -2))

    with ExitStack() as undo:
        for module in readers(engine, kind):
            undo.callback(module.register_forward_pre_hook(keep).remove)
        next_logits(engine, ids[None])
    return [x.view(len(x), n, -1) for x, n in zip(found, widths(engine, kind), strict=True)]


def readers(engine: DePass, kind: str) -> list[nn.Module]:
    """Return the module of every layer whose input the heads are, or the neurons."""
    found = []
    for index in range(engine.adapter.n_layers):
        module = engine.adapter.module(index, PARTS[kind])
        assert module is not None  # see check_maskable
        found.append(module)
    return found


def widths(engine: DePass, kind: str) -> list[int]:
    """Return the number of heads, or of neurons, of every layer."""
    adapter = engine.adapter
    if kind == HEADS:
        return [adapter.attention(index).n_heads for index in range(adapter.n_layers)]
    return [adapter.layer(index).mlp.w_down.shape[1] for index in range(adapter.n_layers)]


def _masking(off: Tensor, values: Tensor | None) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0].view(len(off), -1, args[0].shape[-1])  # (B, N, W·d); some families' MLPs run on (B·N, W)
        wide = off.to(x.device).repeat_interleave(x.shape[-1] // off.shape[-1], -1)[:, None]
        other = x.new_zeros(()) if values is None else values.flatten(1).to(x)
        return (torch.where(wide, other, x).view_as(args[0]), *args[1:])

    return hook


def _parts(items: Any, length: int) -> Iterator[Any]:
    """Yield runs of ``items`` of one length in tokens."""
    count = max(1, TOKENS_AT_ONCE // length)
    for first in range(0, len(items), count):
        yield items[first : first + count]
