"""The activation behind a recurrence's values, shared out over the components by the allocation rule.

Components meet in it as in an MLP: their statistics are gathered in a pass of its own
(:mod:`depass_fast.backends.statistics`), and then every component's values depend on itself alone. A channel of the
values is what a neuron is there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...adapters import Attention
from ...labels import BIAS, REST
from ...runtime.products import accumulate, product
from ...runtime.transfer import to_device
from ...state.layout import Layout
from ...state.state import ComponentState
from ...trace.constants import constant_values, values_before_activation
from ...trace.mixing import FrozenMixing, within_taps
from ...trace.record import AttentionTrace
from ..statistics import GateBlock, Statistics
from .blocks import Block, gather, scatter

PARTS = 4  # of a block of attention: gates, weights and shares of a part are held together
VALUES = -1  # the number of these statistics among those of a layer's MLPs


@dataclass
class SharedValues:
    """The values of one layer at the S segments of a state, C channels each, and the statistics of who drives them.

    ``act`` (S, C) are the activations that are shared out, ``constant`` (S, C) what `bias` drives without a state.
    """

    weights: Attention
    trace: AttentionTrace
    layout: Layout
    prepared: tuple[Tensor, Tensor, Tensor]  # s of all positions (T,), W_V with the norm folded in, and W_O
    dtype: torch.dtype
    act: Tensor
    constant: Tensor | None
    statistics: Statistics
    _last: tuple[int, FrozenMixing] | None = None

    @staticmethod
    def of(
        state: ComponentState,
        weights: Attention,
        trace: AttentionTrace,
        prepared: tuple[Tensor, Tensor, Tensor],
        dtype: torch.dtype,
    ) -> SharedValues:
        """Return those of a layer, of which no component has been met yet."""
        layout, acts, constants = state.layout, [], []
        for prompt in range(len(layout.components)):
            span = _span(layout, prompt)
            c = values_before_activation(weights, trace, span)
            assert trace.value_ratio is not None
            acts.append(c * trace.value_ratio[span].to(c))
            constants.append(constant_values(weights, trace, [len(c)], span))
        act = torch.cat(acts)
        constant = None if constants[0] is None else torch.cat([x for x in constants if x is not None])
        rest = layout.components[0].all.index(REST) is not None
        rule = trace.value_rule
        wide = torch.promote_types(dtype, torch.float32)
        statistics = Statistics.fresh(str(rule.rule), rule.temperature, rest, act.to(wide))
        return SharedValues(weights, trace, layout, prepared, dtype, act.to(wide), constant, statistics)

    def at(self, block: Block) -> slice:
        """Return the segments that a block's components can be alive at."""
        first = self.layout.segments(block.prompt).start + block.start
        return slice(first, first + block.n_positions)

    def meet(self, x: Tensor, block: Block) -> None:
        """Take in a block of components with states ``x`` (r, D)."""
        gates, at = self._gates(x, block, self._mixing(block)), self.at(block)
        with self.statistics.undone_on_failure(at):
            self.statistics.alive[at].add_(gates.alive.sum(1))
            self.statistics.meet(gates, at, slice(None))

    def attend(self, x: Tensor, block: Block, read: Tensor) -> None:
        """Add what the heads give a block to its rows ``x`` (r, D), in place; values are read from ``read`` (r, D)."""
        mixing, at, w_o = self._mixing(block), self.at(block), self.prepared[2]
        gates = self._gates(read, block, mixing)
        shares = self.statistics.shares(gates, at, slice(None)).mul_(self.act[at, None])
        y = mixing.forward_shaped(shares.to(self.dtype), block.start)
        if self.trace.out_scale is not None:
            span = _span(self.layout, block.prompt)
            y = y.mul_(self.trace.out_scale[span][block.start :, None, None].to(self.dtype))
        accumulate(x, gather(y, block), w_o.T)

    def _mixing(self, block: Block) -> FrozenMixing:
        """Return the recurrence of a block's prompt; what was made of the last prompt is kept."""
        if self._last is None or self._last[0] != block.prompt:
            span = _span(self.layout, block.prompt)
            self._last = block.prompt, FrozenMixing(self.weights, self.trace, span, self.dtype)
        return self._last[1]

    def _gates(self, x: Tensor, block: Block, mixing: FrozenMixing) -> GateBlock:
        scale, w_v, _ = self.prepared
        span, at, components = _span(self.layout, block.prompt), self.at(block), self.layout.components[block.prompt]
        values = scatter(product(x.to(self.dtype), w_v.T), block)
        values = mixing.convolved(values.mul_(scale[span][block.start :, None, None].to(self.dtype)), block.start)
        g = values.to(self.statistics.alive.dtype)
        alive = within_taps(scatter((x != 0).any(-1, keepdim=True), block)[..., 0], self.weights)
        chosen = slice(block.first, block.first + block.n_components)
        bias, rest = (self._place(name, block) for name in (BIAS, REST))
        driven = None
        if bias is not None and self.constant is not None:
            g[:, bias] += self.constant[at].to(g)
            driven = (self.constant[at] != 0).any(0)
        away = components.births[chosen] != self.layout.local[at, None]
        excluded = to_device(components.excluded[chosen] & away, x.device)
        return GateBlock(g, alive, excluded, to_device(components.members[chosen], x.device), rest, bias, driven)

    def _place(self, name: str, block: Block) -> int | None:
        component = self.layout.index(name)
        if component is None or not block.first <= component < block.first + block.n_components:
            return None
        return component - block.first


def _span(layout: Layout, prompt: int) -> slice:
    packed: np.ndarray = layout.packed[layout.segments(prompt)]
    return slice(int(packed[0]), int(packed[-1]) + 1)
