"""Effects of leaving components out, each split into the part that attention's change makes and the part without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..engine import DePass
from ..trace.record import Trace
from .frozen import frozen_attention
from .interventions import HEADS, logits_after, masked_logits, replacement_id, widths, zeroed_logits
from .questions import Question

REPLACED, ZEROED = "tokens, replaced", "tokens, at zero"


@dataclass(frozen=True)
class Effects:
    """The fall of the reads (3,) when each of K components is left out, in the order of the question's targets.

    total (K, 3): in an ordinary forward pass. frozen (K, 3): in one with the attention probabilities of the whole
    prompt. rounding: the largest difference of the two with nothing left out.
    """

    total: Tensor
    frozen: Tensor
    rounding: float

    @property
    def attention(self) -> Tensor:
        """The part that attention's change makes, (K, 3)."""
        return self.total - self.frozen


@torch.no_grad()
def effects(engine: DePass, question: Question, trace: Trace, kind: str, chosen: Tensor) -> Effects:
    """Leave the components ``chosen`` out, one at a time.

    ``kind`` "tokens, replaced": the token at a position (K,) is another one, that of
    :func:`depass_fast.evaluate.interventions.replacement_id`. "tokens, at zero": what it brings into layer 0 is zero.
    "heads" and "neurons": the output of a head, or the activation of a neuron, is zero at every position; ``chosen``
    (K, 2) are layers and numbers.

    Raises:
        ValueError: as :func:`depass_fast.evaluate.frozen.frozen_attention`,
            :func:`depass_fast.evaluate.interventions.masked_logits` and ``replacement_id``.
    """
    run = _without_each(engine, question.ids, trace, kind, chosen)
    ordinary = question.values(run())
    with frozen_attention(engine, trace):
        held = question.values(run())
    rounding = float((ordinary[0] - held[0]).abs().max())
    total, frozen = ((one[0] - one[1:]).cpu() for one in (ordinary, held))
    return Effects(total, frozen, rounding)


def _without_each(engine: DePass, ids: Tensor, trace: Trace, kind: str, chosen: Tensor) -> Callable[[], Tensor]:
    """Return the runs with nothing left out, then without each of the components: () -> logits (1 + K, V)."""
    count, at = 1 + len(chosen), 1 + torch.arange(len(chosen))
    if kind in (REPLACED, ZEROED):
        off = torch.zeros(count, len(ids), dtype=torch.bool)
        off[at, chosen] = True
        off = off.to(ids.device)
        if kind == ZEROED:
            return lambda: zeroed_logits(engine, ids, trace.resid(0), off)
        rows = ids.expand(count, -1).masked_fill(off, replacement_id(engine))
        return lambda: logits_after(engine, rows)
    masks = torch.zeros(count, engine.adapter.n_layers, widths(engine, kind)[0], dtype=torch.bool)
    masks[at, chosen[:, 0], chosen[:, 1]] = True
    return lambda: masked_logits(engine, ids, masks, kind)


def drawn_heads(engine: DePass, count: int, draw: torch.Generator) -> Tensor:
    """Draw about ``count`` heads, as many of every layer and one at least: layers and numbers (K, 2)."""
    found = []
    for layer, heads in enumerate(widths(engine, HEADS)):
        each = min(heads, max(1, round(count / engine.adapter.n_layers)))
        found += [[layer, head] for head in torch.randperm(heads, generator=draw)[:each].sort().values.tolist()]
    return torch.tensor(found)


def drawn_neurons(sizes: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """Draw ``count`` neurons with chances in proportion to their ``sizes`` (L, I): layers and numbers (K, 2)."""
    flat = sizes.flatten()
    chosen = torch.multinomial(flat, min(count, int((flat > 0).sum())), generator=draw)
    return torch.stack([chosen // sizes.shape[1], chosen % sizes.shape[1]], 1)
