"""The components that are dealt to this rank, where they start (DESIGN.md section 3, *Sharding*).

What all ranks have to agree on is exchanged here: the sum of components that no rank has all of, of which `rest` is
what is left, and if there is a `rest`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..adapters import Adapter
from ..labels import REST
from ..runtime.ranks import Ranks
from ..state.layout import Components, Layout
from ..state.state import ComponentState
from ..trace.record import Trace
from .base import ComponentKind
from .chosen import block_of, constant_of, empty_part, fill_part, fill_products, fill_tokens
from .model import Tokens
from .products import BoundProducts
from .start import (
    components_of,
    entering,
    initial_state,
    rounding_given,
    settle_rounding,
    without_first,
    without_rest,
)


@torch.no_grad()
def dealt_state(
    kind: ComponentKind,
    adapter: Adapter,
    trace: Trace,
    ranks: Ranks,
    *,
    has_bias: bool,
    dtype: torch.dtype,
    tokens: Sequence[Sequence[str]],
    excluded: Sequence[set[int]],
    in_host_memory: bool,
    bound: Sequence[ComponentKind],
) -> ComponentState:
    """Return this rank's components at the start of ``kind``; the sum over all ranks is the residual stream there.

    Tokens, neurons and features are made by the rank that has them. Of other kinds every rank makes all and keeps its
    own. Arguments as of :func:`depass_fast.components.start.initial_state`.
    """
    products = [one for one in bound if isinstance(one, BoundProducts)]
    if not isinstance(kind, Tokens) and not products:
        more = {"has_bias": has_bias, "dtype": dtype, "in_host_memory": in_host_memory, "bound": bound}
        every = initial_state(kind, adapter, trace, ranks=ranks, **more)
        own = deal(every.layout.components, ranks)
        state = empty_part(kind, adapter, trace, own, dtype, in_host_memory)
        fill_part(state, every)
        return state
    has_bias = has_bias or any(one.bias is not None for one in products)
    components = components_of(bound, adapter, trace, has_bias, tokens, excluded)
    state = empty_part(kind, adapter, trace, deal(components, ranks), dtype, in_host_memory)
    if isinstance(kind, Tokens):
        fill_tokens(state, entering(kind, adapter, trace), trace)
        return state
    return _products(state, kind, products, entering(kind, adapter, trace), trace, ranks)


def deal(components: Sequence[Components], ranks: Ranks) -> tuple[Components, ...]:
    """Return this rank's part of the ``components`` of every prompt."""
    return tuple(one.only(ranks.deal(len(one.extras), len(one.names))) for one in components)


def _products(
    state: ComponentState,
    kind: ComponentKind,
    products: Sequence[BoundProducts],
    x: Tensor,
    trace: Trace,
    ranks: Ranks,
) -> ComponentState:
    """Fill a state with this rank's part of the ``products``, and with what they leave of ``x`` (T, D)."""
    x, given, has_rest = x.to(state.device), rounding_given(kind, x), False
    for prompt, bound in enumerate(products):
        fill_products(state, prompt, bound)
        block, extras = block_of(state, prompt), state.layout.components[prompt].extras
        named, wide = block[:, len(extras) :], torch.promote_types(block.dtype, torch.float32)
        here = x[trace.span(prompt)]
        total = ranks.sum(named.sum(1, dtype=wide)) + constant_of(bound, wide).to(block.device)
        rest = (here.to(wide) - total).to(block.dtype)
        if kind.may_be_complete:
            settle_rounding(rest, named, here.to(block.dtype), given, kind.complete_at_once, ranks)
        if REST in extras:
            block[:, extras.index(REST)] = rest
        has_rest |= bool(rest.any())
    if not kind.may_be_complete or ranks.any(has_rest):
        return state
    rows = without_first(state.rows, state.layout) if state.layout.index(REST) is not None else state.rows
    whole = without_rest([components.all for components in state.layout.components])
    return ComponentState(rows, Layout.of(deal(whole, ranks), trace.offsets), state.layer, state.site)
