"""A frozen recurrence in the place of a softmax, for the torch backend: applied to blocks of components."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...adapters import Attention
from ...runtime.products import accumulate, write_product
from ...state.state import ComponentState
from ...trace.mixing import FrozenMixing
from ...trace.record import AttentionTrace
from .blocks import Block, scatter
from .workspace import Workspace


def mixing(
    state: ComponentState,
    weights: Attention,
    trace: AttentionTrace,
    prepared: tuple[Tensor, Tensor, Tensor],
    dtype: torch.dtype,
    workspace: Workspace,
) -> Callable[[Tensor, Block, Tensor], None]:
    """Return a function that adds what a recurrence gives a block to its rows (r, D), in place; see ``_attending``.

    ``prepared`` are s of all positions (T,), W_V with the norm folded in, and W_O. What was made of the last prompt is
    kept for its next block.
    """
    scale, w_v, w_o = prepared
    kept: dict[int, tuple[slice, FrozenMixing]] = {}

    def of(prompt: int) -> tuple[slice, FrozenMixing]:
        if prompt not in kept:
            kept.clear()
            packed = state.layout.packed[state.layout.segments(prompt)]
            span = slice(int(packed[0]), int(packed[-1]) + 1)
            kept[prompt] = span, FrozenMixing(weights, trace, span, dtype)
        return kept[prompt]

    def attend(x: Tensor, block: Block, read: Tensor) -> None:
        span, mixed = of(block.prompt)
        values = workspace.take("values", (len(x), len(w_v)), x, dtype)
        write_product(values, read.to(dtype), w_v.T)
        dense = scatter(values, block).mul_(scale[span][block.start :, None, None].to(dtype))
        y = mixed.forward(dense, block.start)
        if trace.out_scale is not None:
            y = y.mul_(trace.out_scale[span][block.start :, None, None].to(dtype))
        y = y.flatten(0, 1)
        accumulate(x, y if block.slots is None else y.index_select(0, block.slots), w_o.T)

    return attend
