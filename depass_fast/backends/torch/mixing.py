"""Frozen recurrences, and keys that are values, for the torch backend: applied to blocks of components."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...adapters import Attention
from ...runtime.products import accumulate, write_product
from ...state.state import ComponentState, Factors
from ...trace.keyed import FrozenKeyed, frozen_mixing
from ...trace.mixing import FrozenMixing
from ...trace.record import AttentionTrace
from .blocks import Block, gather, scatter_within
from .workspace import Workspace


def mixing(
    state: ComponentState,
    weights: Attention,
    trace: AttentionTrace,
    prepared: tuple[Tensor, Tensor, Tensor],
    dtype: torch.dtype,
    workspace: Workspace,
) -> Callable[[Tensor, Block, Tensor], None]:
    """Return a function that adds what such a layer gives a block to its rows (r, D), in place; see ``_attending``.

    ``prepared`` are s of all positions (T,), W_V with the norm folded in, and W_O. What was made of the last prompt is
    kept for its next block.
    """
    scale, w_v, w_o = prepared
    kept: dict[int, FrozenMixing | FrozenKeyed] = {}

    def span(prompt: int) -> slice:
        packed = state.layout.packed[state.layout.segments(prompt)]
        return slice(int(packed[0]), int(packed[-1]) + 1)

    def of(prompt: int) -> FrozenMixing | FrozenKeyed:
        if prompt not in kept:
            kept.clear()
            kept[prompt] = frozen_mixing(weights, trace, span(prompt), dtype, scale[span(prompt)])
        return kept[prompt]

    def heads(x: Tensor, block: Block) -> Tensor:
        """Return what the heads give to a block: (N', B, H·d)."""
        mixed = of(block.prompt)
        if state.factors is None:
            values = workspace.take("values", (block.n_positions * block.n_components, len(w_v)), x, dtype)
            write_product(values[len(values) - len(x) :], x.to(dtype), w_v.T)
            return mixed.forward(scatter_within(values, block, len(x)), block.start)
        factors, extras = state.factors[block.prompt], len(state.layout.components[block.prompt].extras)
        first = block.first - extras
        if factors.coefficients is None and first >= 0 and isinstance(mixed, FrozenMixing) and mixed.takes_single:
            named = slice(first, first + block.n_components)
            values = factors.vectors[named].to(x.device, dtype) @ w_v.T
            return mixed.forward_single(values, torch.arange(named.start, named.stop, device=x.device), block.start)
        return mixed.forward(_started(x, block, factors, extras, w_v), block.start)

    def attend(x: Tensor, block: Block, read: Tensor) -> None:
        y = heads(read, block)
        if trace.out_scale is not None:
            y = y.mul_(trace.out_scale[span(block.prompt)][block.start :, None, None].to(dtype))
        accumulate(x, gather(y, block), w_o.T)

    return attend


def _started(x: Tensor, block: Block, factors: Factors, extras: int, w_v: Tensor) -> Tensor:
    """Values (N', B, C) of components that have just started as products: W_V sees their vectors and rows of extras."""
    n, b = block.n_positions, block.n_components
    n_extras = min(b, max(0, extras - block.first))
    part = slice(block.first + n_extras - extras, block.first + b - extras)
    out = w_v.new_zeros(n, b, len(w_v))
    named = factors.vectors[part].to(w_v) @ w_v.T
    if factors.coefficients is None:  # each at its own position
        token = torch.arange(part.start, part.stop, device=x.device)
        out[token - block.start, torch.arange(n_extras, b, device=x.device)] = named
    else:
        torch.mul(factors.coefficients[block.start :, part, None].to(w_v), named, out=out[:, n_extras:])
    if n_extras:
        places = torch.arange(n * b, device=x.device) if block.slots is None else block.slots
        at = (places % b < n_extras).nonzero().flatten()
        out.view(n * b, -1)[places[at]] = x[at].to(w_v) @ w_v.T
    return out
