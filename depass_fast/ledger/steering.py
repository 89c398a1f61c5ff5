"""The second book of a way back: what the target owes to where heads look, beside what they carry.

Under a linear rule both are linear in the components. The gradient κ of the second book starts at zero; at every
attention it takes up the credit of that layer's looking, which the first book's gradient λ decides, and goes back
through the layers like λ (DESIGN.md section 9).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..adapters import Adapter, Attention
from ..looking.freeze import freeze_sides
from ..looking.steer import Outlook, steer, values_of
from ..looking.turned import turns_of
from ..runtime.products import product
from ..trace.record import AttentionTrace, Trace
from ..trace.turns import Turns
from .batches import Packing


@dataclass(frozen=True)
class Taken:
    """The credit that κ takes up at one layer: ``gradients`` (R, T, D), and of every prompt (R, P) the rest.

    ``worth`` is that of constants and places, ``change`` the sum of all credit, ``size`` that of its heads' amounts.
    """

    gradients: Tensor
    worth: Tensor
    change: Tensor
    size: Tensor


@dataclass
class Steers:
    """The queries and keys of all layers on a way back, as the prompts' ``turns`` give them.

    With ``keeps`` κ takes up nothing, and what the heads of every layer and prompt are worth is kept.
    """

    adapter: Adapter
    trace: Trace
    turns: list[dict[int, Turns]]
    keeps: bool = False
    kept: dict[int, list[Outlook]] = field(default_factory=dict)
    off: float = 0.0  # how far queries and keys are from those recorded, relatively: the model's own rounding

    @staticmethod
    def of(
        adapter: Adapter, trace: Trace, prompts: Sequence[Tensor], layers: Collection[int], keeps: bool = False
    ) -> Steers:
        """Measure the turns of ``layers``. ``prompts`` are whole, also where the trace holds their first positions.

        Raises:
            ValueError: queries and keys cannot be made again; the message names the family.
        """
        return Steers(adapter, trace, turns_of(adapter, prompts, layers), keeps)

    def through(
        self, index: int, weights: Attention, record: AttentionTrace, packing: Packing, partial: bool, back: Tensor
    ) -> Taken | None:
        """Return the credit of layer ``index``, given gradients (R, A, D) of what its attention adds."""
        outlooks = self._outlooks(index, weights, record, packing, partial, back)
        if self.keeps:
            self.kept[index] = outlooks
            return None
        found = [steer(one) for one in outlooks]
        gradients = back.new_zeros(len(back), packing.n_positions, back.shape[2])
        for p, one in enumerate(found):
            gradients[:, self.trace.span(p)] = one.together()
        worth = torch.stack([(one.constant + one.position).sum(1) for one in found], 1)
        change = torch.stack([one.change.sum(1) for one in found], 1)
        return Taken(gradients, worth, change, torch.stack([one.change.abs().sum(1) for one in found], 1))

    def _outlooks(
        self, index: int, weights: Attention, record: AttentionTrace, packing: Packing, partial: bool, back: Tensor
    ) -> list[Outlook]:
        """Return what the heads are worth in every prompt."""
        dtype, at = back.dtype, packing.at(partial, back.device)
        out_scale = record.out_scale if at is None or record.out_scale is None else record.out_scale[at]
        of_heads = product(weights.written_transposed(back, out_scale), weights.w_o.to(dtype))
        of_heads = of_heads.unflatten(-1, (weights.n_heads, -1))
        found, first = [], 0
        for p in range(self.trace.n_prompts):
            span = self.trace.span(p)
            queries = torch.from_numpy(packing.reads[p]) if partial else torch.arange(self.trace.length(p))
            rows = slice(first, first + len(queries))
            first = rows.stop
            sides = freeze_sides(self.adapter, index, record, span, self.turns[p][index], dtype)
            self.off = max(self.off, sides.off)
            values = values_of(weights, record, record.resid[span].to(dtype), span)
            at_queries = queries.to(back.device), of_heads[:, rows]
            found.append(Outlook(record, sides, span, *at_queries, values))
        return found
