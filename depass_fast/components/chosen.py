"""A part of the components where they start; of tokens, neurons and features without making the others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..adapters import Adapter
from ..labels import BIAS
from ..runtime.transfer import to_device
from ..state.layout import Components, Layout
from ..state.state import ComponentState
from ..trace.record import Trace
from .base import ComponentKind
from .products import BoundProducts
from .start import empty_rows, entering

_PART = 8 << 20  # numbers made at a time


def empty_part(
    kind: ComponentKind,
    adapter: Adapter,
    trace: Trace,
    components: Sequence[Components],
    dtype: torch.dtype,
    in_host_memory: bool = False,
) -> ComponentState:
    """Return a state of zeros for some ``components`` of every prompt, where ``kind`` starts."""
    layout, x = Layout.of(tuple(components), trace.offsets), entering(kind, adapter, trace)
    return ComponentState(empty_rows(layout, x, dtype, in_host_memory).zero_(), layout, *kind.entry(adapter))


def fill_part(state: ComponentState, every: ComponentState) -> None:
    """Write those components of a state of ``every`` component, which live everywhere, that ``state`` is for."""
    for prompt, components in enumerate(state.layout.components):
        block = every.rows[every.layout.rows(prompt)].unflatten(0, (-1, len(components.all)))
        places = to_device(components.members, block.device)
        state.rows[state.layout.rows(prompt)] = block.index_select(1, places).flatten(0, 1).to(state.device)


def fill_tokens(state: ComponentState, x: Tensor, trace: Trace) -> None:
    """Write the residual stream ``x`` (T, D) of the tokens that a state of zeros is for to where they are born."""
    layout = state.layout
    for prompt, components in enumerate(layout.components):
        born, n_extras = components.named, len(components.extras)
        rows = layout.starts[layout.segments(prompt).start + born] + n_extras + np.arange(len(born))
        states = x[trace.span(prompt)][to_device(born, x.device)]
        state.rows[to_device(rows, state.device)] = states.to(state.rows)


def fill_products(state: ComponentState, prompt: int, bound: BoundProducts) -> None:
    """Write the components of a prompt that a state is for, of those that are ``bound``; all but `rest`."""
    block, components = block_of(state, prompt), state.layout.components[prompt]
    extras, dtype = components.extras, block.dtype
    wide = torch.promote_types(dtype, torch.float32)
    coefficients = bound.products.coefficients
    assert coefficients is not None, "neurons and features have numbers at every position"
    at = to_device(components.named, coefficients.device)
    numbers, vectors = coefficients[:, at].to(wide), bound.products.vectors[at].to(wide)
    size = max(1, _PART // max(1, vectors.numel()))
    for first in range(0, len(block), size):
        part = slice(first, first + size)
        block[part, len(extras) :] = (numbers[part, :, None] * vectors).to(block)
    if BIAS in extras:
        block[:, extras.index(BIAS)] = constant_of(bound, wide).to(block)


def constant_of(bound: BoundProducts, dtype: torch.dtype) -> Tensor:
    """Return the constant of bound components, (D,) or (N, D), zero where there is none."""
    if bound.bias is None:
        return torch.zeros_like(bound.products.vectors[0], dtype=dtype)
    return bound.bias.to(dtype)


def block_of(state: ComponentState, prompt: int) -> Tensor:
    """Return a prompt's rows as (N, M, D). Their components live everywhere."""
    layout = state.layout
    segments, m = layout.segments(prompt), len(layout.components[prompt])
    return state.rows[layout.rows(prompt)].view(segments.stop - segments.start, m, state.rows.shape[1])
