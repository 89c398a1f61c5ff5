"""The initial component state: a kind's components and what they lack to the hidden state, laid out as rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..adapters import Adapter
from ..labels import BIAS, REST
from ..runtime.memory import empty_on_host
from ..runtime.transfer import to_device
from ..state.layout import Components, Layout
from ..state.state import ComponentState, Factors
from ..trace.record import Trace
from .base import ComponentKind
from .model import Tokens
from .products import BoundProducts

_PART = 8 << 20  # numbers made on the device at a time, where they are to lie in host memory


def initial_state(
    kind: ComponentKind,
    adapter: Adapter,
    trace: Trace,
    tokens: Sequence[Sequence[str]],
    excluded: Sequence[set[int]],
    has_bias: bool,
    dtype: torch.dtype,
    host: bool = False,
    bound: Sequence[ComponentKind] | None = None,
) -> ComponentState:
    """The component state at the start of ``kind``; its sum is the residual stream there.

    ``tokens`` are the prompts' token texts, ``excluded`` the positions of special tokens (for `Tokens` only),
    ``has_bias`` says whether constants are still to come, so that there must be a `bias` component. With ``host`` the
    rows lie in host memory, pinned for a GPU if they can be. ``bound`` is the kind for every prompt, if it was bound
    already.
    """
    layer, site = kind.entry(adapter)
    x = trace.resid_at(layer, site).to(adapter.layer_device(kind.resolve(adapter)))
    kinds = list(bound or (kind.bound(adapter, trace, prompt) for prompt in range(trace.n_prompts)))
    constants = [k.constant(adapter, trace, prompt, dtype) for prompt, k in enumerate(kinds)]
    bias = (BIAS,) if has_bias or any(c is not None for c in constants) else ()
    names = [k.names(adapter, t) for k, t in zip(kinds, tokens, strict=True)]
    factors = tuple(k.factors(adapter, trace, prompt) for prompt, k in enumerate(kinds))
    factors = None if None in factors else factors
    if isinstance(kind, Tokens):
        components = tuple(Components.tokens(n, bias, e) for n, e in zip(names, excluded, strict=True))
        layout = Layout.of(components, trace.offsets)
        rows = _rows(layout, x, dtype, host).zero_()
        rows[to_device(layout.starts[1:] - 1, rows.device)] = x.to(rows)
        return ComponentState(rows, layout, layer, site, factors)

    extras = (REST, *bias)
    components = tuple(Components.everywhere(n, extras) for n in names)
    layout = Layout.of(components, trace.offsets)
    rows = _rows(layout, x, dtype, host)
    near, x = x, x.to(rows.device)
    wide = torch.promote_types(dtype, torch.float32)
    coarsest = max(torch.finfo(t.dtype).eps for t in (rows, x, *kind.given()))
    settled = False
    for prompt in range(trace.n_prompts):
        block = rows[layout.rows(prompt)].view(trace.length(prompt), len(components[prompt]), -1)
        named = block[:, len(extras) :]
        if not host:
            kinds[prompt].fill(named, adapter, trace, prompt)
        elif isinstance(kinds[prompt], BoundProducts):
            _fill_in_parts(named, kinds[prompt].products)
        else:  # few components
            made = torch.empty(named.shape, dtype=dtype, device=near.device)
            kinds[prompt].fill(made, adapter, trace, prompt)
            named.copy_(made)
        if bias:
            block[:, 1] = 0.0 if constants[prompt] is None else constants[prompt]
        block[:, 0] = x[trace.span(prompt)] - block[:, 1:].sum(1, dtype=wide)
        if kind.may_be_complete:
            settled |= _settle_rounding(block[:, 0], named, x[trace.span(prompt)].to(dtype), coarsest)
    factors = None if settled else factors
    if kind.may_be_complete and not rows[to_device(layout.extra_rows(REST), x.device)].any():
        fewer = tuple(Components.everywhere(c.names, bias) for c in components)
        return ComponentState(_without_first(rows, layout), Layout.of(fewer, trace.offsets), layer, site)
    return ComponentState(rows, layout, layer, site, factors)


def _rows(layout: Layout, x: Tensor, dtype: torch.dtype, host: bool) -> Tensor:
    """Room for the rows of a state, where ``x`` is or in host memory."""
    shape = layout.n_rows, x.shape[1]
    if not host:
        return torch.empty(shape, dtype=dtype, device=x.device)
    return empty_on_host(shape, dtype, pinned=x.is_cuda)


def _fill_in_parts(out: Tensor, products: Factors) -> None:
    """Products into ``out`` (N, M, D) in host memory, some positions at a time: they need not fit on the device."""
    vectors = products.vectors.to(out.dtype)
    size = max(1, _PART // vectors.numel())
    for first in range(0, len(out), size):
        part = slice(first, first + size)
        out[part].copy_(products.coefficients[part].to(out.dtype)[..., None] * vectors)


def meets_bias(kind: ComponentKind, adapter: Adapter, end: int | None) -> bool:
    """Whether an additive constant lies between the components and the input of layer ``end``, or the logits (None)."""
    return meet_bias([kind], adapter, end)[0]


def meet_bias(kinds: Sequence[ComponentKind], adapter: Adapter, end: int | None) -> list[bool]:
    """:func:`meets_bias` of several kinds; no layer is looked at twice."""
    first = [kind.entry(adapter).order for kind in kinds]
    last = _last_constant(adapter, min(first) // 2, end)
    return [one <= last for one in first]


def _last_constant(adapter: Adapter, first: int, end: int | None) -> float:
    """The last module of the layers from ``first`` on, before ``end``, that adds a constant: 2·l or 2·l + 1 in layer l.

    The former is its attention, the latter its MLP; -1 where none does, inf where the readout does.
    """
    if end is None:
        norm = adapter.final_norm()
        if (norm is not None and norm.bias is not None) or adapter.unembedding_bias is not None:
            return torch.inf
        end = adapter.n_layers
    for index in reversed(range(first, end)):
        weights = adapter.layer(index)
        if weights.has_mlp_bias:
            return 2 * index + 1
        if weights.attention.has_bias:
            return 2 * index
    return -1


def _without_first(rows: Tensor, layout: Layout) -> Tensor:
    """The rows without the first of every segment, moved up in place: a second state would be the peak of memory."""
    kept = 0
    for start, count in zip(layout.starts[:-1].tolist(), layout.counts.tolist(), strict=True):
        rows[kept : kept + count - 1] = rows[start + 1 : start + count].clone()
        kept += count - 1
    return rows[:kept]


def _settle_rounding(rest: Tensor, named: Tensor, x: Tensor, eps: float) -> bool:
    """Where ``rest`` (N, D) is only rounding, give it to the largest of ``named`` (N, M, D): the sum stays exact.

    Returned is whether there was any. Rounding must not become a component: the softmax would give it a share like any
    other. Rounding is what is below eps^0.75 (6e-6 in float32: states from another run or machine differ by more than
    the rounding of one sum) of the largest component, and below a hundredth of x.
    """
    size, norms = rest.norm(dim=-1), named.norm(dim=-1)
    rounding = (size <= eps**0.75 * torch.maximum(norms.amax(1), x.norm(dim=-1))) & (size <= 0.01 * x.norm(dim=-1))
    at = rounding.nonzero().flatten()
    largest = norms[at].argmax(1)
    named[at, largest] += rest[at]
    rest[at] = 0.0
    return len(at) > 0
