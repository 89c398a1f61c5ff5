"""The initial component state: a kind's components, and their difference from the hidden state, laid out as rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..adapters import Adapter
from ..allocation import Allocation
from ..labels import BIAS, REST
from ..linear_rules import adds_constant
from ..runtime.memory import empty_on_host
from ..runtime.ranks import Ranks
from ..runtime.transfer import to_device
from ..state.layout import Components, Layout
from ..state.state import ComponentState, Factors
from ..trace.record import Trace
from .base import ComponentKind
from .model import Tokens
from .products import BoundProducts

_PART = 8 << 20  # numbers computed on the device at a time, if the state lies in host memory


@torch.no_grad()
def initial_state(
    kind: ComponentKind,
    adapter: Adapter,
    trace: Trace,
    *,
    has_bias: bool,
    dtype: torch.dtype,
    tokens: Sequence[Sequence[str]] | None = None,
    excluded: Sequence[set[int]] | None = None,
    in_host_memory: bool = False,
    bound: Sequence[ComponentKind] | None = None,
    ranks: Ranks | None = None,
) -> ComponentState:
    """The component state at the start of ``kind``; its sum is the residual stream there.

    Args:
        has_bias: constants are still to come, so that there must be a `bias` component.
        dtype: the state's dtype.
        tokens: the token texts of every prompt, for the names of `Tokens`; None: empty ones.
        excluded: the positions of every prompt's special tokens, for `Tokens` only; None: there are none.
        in_host_memory: the rows lie in host memory, pinned for a GPU if they can be.
        bound: the kind for every prompt, if it was bound already.
        ranks: those that make the same state and agree on it having a `rest`.
    """
    layer, site = kind.entry(adapter)
    x = entering(kind, adapter, trace)
    kinds = list(bound or (kind.bound(adapter, trace, prompt) for prompt in range(trace.n_prompts)))
    constants = _constants(kinds, adapter, trace, dtype)
    components = components_of(kinds, adapter, trace, has_bias or _has_any(constants), tokens, excluded)
    layout, factors = Layout.of(components, trace.offsets), _factors(kinds, adapter, trace)
    if isinstance(kind, Tokens):
        return ComponentState(_token_rows(layout, x, dtype, in_host_memory), layout, layer, site, factors)

    bias = components[0].extras[1:]
    rows = empty_rows(layout, x, dtype, in_host_memory)
    near, x, alone = x.device, x.to(rows.device), kind.fills(adapter, trace)
    given, has_settled, fill = rounding_given(kind, x), False, None
    for prompt, (one, constant) in enumerate(zip(kinds, constants, strict=True)):
        block = rows[layout.rows(prompt)].view(trace.length(prompt), len(components[prompt]), -1)
        named, here = block[:, 1 + len(bias) :], x[trace.span(prompt)]
        if in_host_memory:
            _fill_from_device(named, one, adapter, trace, prompt, near)
        else:
            if fill is None or one is not kinds[prompt - 1]:
                fill = one.filler(adapter, trace, dtype)
            fill(named, prompt)
        if bias:
            block[:, 1] = 0.0 if constant is None else constant
        total = block[:, 1:].sum(1, dtype=torch.promote_types(dtype, torch.float32))
        torch.sub(here, total, out=block[:, 0])
        for part in alone:  # nothing else is in these streams: the difference is rounding
            block[:, 0, part] = 0.0
        if kind.may_be_complete:
            has_settled |= settle_rounding(block[:, 0], named, here.to(dtype), given, kind.complete_at_once)
    state = ComponentState(rows, layout, layer, site, None if has_settled else factors)
    if not kind.may_be_complete or _has_rest(state, ranks):
        return state
    layout = Layout.of(without_rest(components), trace.offsets)
    return ComponentState(without_first(rows, state.layout), layout, layer, site)


def _names(kinds: Sequence[ComponentKind], adapter: Adapter, tokens: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """The names of every prompt's components: made once where they are the same for all, as all but tokens' are."""
    first, same = kinds[0], all(kind is kinds[0] for kind in kinds)
    if same and not isinstance(first, Tokens):
        return [first.names(adapter, tokens[0])] * len(kinds)
    return [kind.names(adapter, texts) for kind, texts in zip(kinds, tokens, strict=True)]


def _constants(
    kinds: Sequence[ComponentKind], adapter: Adapter, trace: Trace, dtype: torch.dtype
) -> list[Tensor | None]:
    """The constant in every prompt's outputs. One that has no positions comes from the weights, alike for all."""
    first = kinds[0].constant(adapter, trace, 0, dtype)
    if all(kind is kinds[0] for kind in kinds) and (first is None or first.ndim == 1):
        return [first] * len(kinds)
    return [first, *(kind.constant(adapter, trace, prompt, dtype) for prompt, kind in enumerate(kinds[1:], 1))]


def entering(kind: ComponentKind, adapter: Adapter, trace: Trace) -> Tensor:
    """The residual stream (T, D) where a kind starts, on the device of the layer that it starts in."""
    return trace.resid_at(*kind.entry(adapter)).to(adapter.layer_device(kind.resolve(adapter)))


def components_of(
    kinds: Sequence[ComponentKind],
    adapter: Adapter,
    trace: Trace,
    has_bias: bool,
    tokens: Sequence[Sequence[str]] | None = None,
    excluded: Sequence[set[int]] | None = None,
) -> tuple[Components, ...]:
    """The components of every prompt, of which ``kinds`` are the bound kinds; arguments as of :func:`initial_state`."""
    tokens = tokens or [[""] * trace.length(prompt) for prompt in range(trace.n_prompts)]
    names = _names(kinds, adapter, tokens)
    bias = (BIAS,) if has_bias else ()
    if isinstance(kinds[0], Tokens):
        excluded = excluded or [set()] * trace.n_prompts
        embedded = kinds[0].resolve(adapter) == 0
        return tuple(Components.tokens(n, bias, e, embedded) for n, e in zip(names, excluded, strict=True))
    return tuple(Components.everywhere(n, (REST, *bias)) for n in names)


def without_rest(components: Sequence[Components]) -> tuple[Components, ...]:
    """The same components without `rest`, the first of the extras."""
    return tuple(Components.everywhere(c.names, c.extras[1:]) for c in components)


def rounding_given(kind: ComponentKind, x: Tensor) -> float:
    """The coarsest eps of what the components of a kind were made of: the user's tensors, and the states ``x``."""
    sources = kind.user_tensors() if kind.complete_at_once else (x, *kind.user_tensors())  # states may be of other runs
    return max((torch.finfo(tensor.dtype).eps for tensor in sources), default=0.0)


def _has_any(constants: Sequence[Tensor | None]) -> bool:
    return any(constant is not None for constant in constants)


def _has_rest(state: ComponentState, ranks: Ranks | None) -> bool:
    found = bool(state.rows[to_device(state.layout.extra_rows(REST), state.device)].any())
    return found if ranks is None else ranks.any(found)


def _factors(kinds: Sequence[ComponentKind], adapter: Adapter, trace: Trace) -> tuple[Factors, ...] | None:
    """The products of every prompt, or None if the components of any prompt are none."""
    found = []
    for prompt, kind in enumerate(kinds):
        factors = kind.factors(adapter, trace, prompt)
        if factors is None:
            return None
        found.append(factors)
    return tuple(found)


def empty_rows(layout: Layout, x: Tensor, dtype: torch.dtype, in_host_memory: bool) -> Tensor:
    """Memory for the rows of a state, on the device of ``x`` or on the host."""
    shape = layout.n_rows, x.shape[1]
    if not in_host_memory:
        return torch.empty(shape, dtype=dtype, device=x.device)
    return empty_on_host(shape, dtype, pinned=x.is_cuda)


def _token_rows(layout: Layout, x: Tensor, dtype: torch.dtype, in_host_memory: bool) -> Tensor:
    """Rows of zeros but for the last of every position, its token's: the residual stream ``x`` (T, D)."""
    rows = empty_rows(layout, x, dtype, in_host_memory).zero_()
    rows[to_device(layout.starts[1:] - 1, rows.device)] = x.to(rows)
    return rows


def _fill_from_device(
    named: Tensor, kind: ComponentKind, adapter: Adapter, trace: Trace, prompt: int, device: torch.device
) -> None:
    """Write a kind's states into ``named`` (N, M, D) in host memory. They are computed on ``device``."""
    if isinstance(kind, BoundProducts):
        _fill_in_parts(named, kind.products)
    else:  # few components
        made = torch.empty(named.shape, dtype=named.dtype, device=device)
        kind.fill(made, adapter, trace, prompt)
        named.copy_(made)


def _fill_in_parts(out: Tensor, products: Factors) -> None:
    """Write products into ``out`` (N, M, D) in host memory, some positions at a time: they need not fit the device."""
    assert products.coefficients is not None
    vectors = products.vectors.to(out.dtype)
    size = max(1, _PART // vectors.numel())
    for first in range(0, len(out), size):
        part = slice(first, first + size)
        out[part].copy_(products.coefficients[part].to(out.dtype)[..., None] * vectors)


def meets_bias(kind: ComponentKind, adapter: Adapter, end: int | None, allocation: Allocation) -> bool:
    """True if a constant is added between the components' start and the input of layer ``end`` (None: the logits).

    Under a linear rule an activation may have one of its own.
    """
    return each_meets_bias([kind], adapter, end, allocation)[0]


def each_meets_bias(
    kinds: Sequence[ComponentKind], adapter: Adapter, end: int | None, allocation: Allocation
) -> list[bool]:
    """:func:`meets_bias` of several kinds; no layer is looked at twice."""
    first = [kind.entry(adapter).order for kind in kinds]
    last = _last_constant(adapter, min(first) // 2, end, allocation.linear_rule)
    shared, embedded = list(_read_ahead(adapter, min(first) // 2, end)), _last_embedded(adapter, end)
    found = [one <= last or any(source < one <= reader for source, reader in shared) for one in first]
    others = [not isinstance(kind, Tokens) or one > 0 for kind, one in zip(kinds, first, strict=True)]
    return [meets or (other and one <= embedded) for meets, other, one in zip(found, others, first, strict=True)]


def _last_constant(adapter: Adapter, first: int, end: int | None, rule: str | None) -> float:
    """The last module that adds a constant in the layers from ``first`` on, before ``end``.

    Layer l's attention is 2·l and its MLP 2·l + 1. The result is -1 if there is none, inf if the readout adds one.
    """
    if end is None:
        norm = adapter.final_norm()
        if (norm is not None and norm.bias is not None) or adapter.has_end_constants:
            return torch.inf
        end = adapter.n_layers
    for index in reversed(range(first, end)):
        weights = adapter.layer(index)
        if weights.has_mlp_bias or (rule is not None and any(adds_constant(rule, mlp) for mlp in weights.mlps)):
            return 2 * index + 1
        if weights.attention is not None and weights.attention.has_bias:
            return 2 * index
    return -1


def _last_embedded(adapter: Adapter, end: int | None) -> int:
    """The last module before layer ``end`` behind which the next layer's own embeddings enter; -1 if there is none.

    Modules are numbered as above. For tokens from layer 0 on they are no constants.
    """
    layers = range(1, adapter.n_layers if end is None else end + 1)
    return max((2 * index - 1 for index in layers if adapter.embeddings_of(index) is not None), default=-1)


def _read_ahead(adapter: Adapter, first: int, end: int | None) -> Iterator[tuple[int, int]]:
    """The attention of layers that later ones take values from, and of these, numbered as modules are.

    So it is with experts that read what the MLP of the layer before reads.

    For components that start between the two, what the later one writes is a constant.
    """
    for index in range(first, adapter.n_layers if end is None else end):
        source = adapter.kind(index).source
        if source is not None:
            yield 2 * source, 2 * index
        if adapter.kind(index).has_experts_ahead:
            yield 2 * index - 1, 2 * index + 1


def without_first(rows: Tensor, layout: Layout) -> Tensor:
    """The rows without the first of every segment. They move up in place, as a second state would be the peak."""
    kept = 0
    for start, count in zip(layout.starts[:-1].tolist(), layout.counts.tolist(), strict=True):
        rows[kept : kept + count - 1] = rows[start + 1 : start + count].clone()
        kept += count - 1
    return rows[:kept]


def settle_rounding(
    rest: Tensor, named: Tensor, x: Tensor, given: float, at_once: bool, ranks: Ranks | None = None
) -> bool:
    """Move ``rest`` (N, D), where it is only rounding, into ``named`` (N, M, D): the sum stays exact.

    Every component gets of it in proportion to its norm, so that equal ones stay equal and zeros stay zero. Returns
    True if there was any. Rounding must not become a component: the softmax would give it a share like any other.

    A rest is rounding up to a hundredth of x, and up to eps^0.75 of the state's dtype, relative to the largest
    component: that is 6e-6 in float32, as states from another run or machine differ by more than the rounding of one
    sum. Half precision differs by eps. What was ``given`` with a coarser eps explains as much as that; with ``at_once``
    half as much, as each number is rounded once, and only where it explains the rest of every position: a rest that is
    larger somewhere shows that there is one.

    ``named`` may be a part of the components. The others are then those of the other ``ranks``, which have the same
    ``rest``, and all agree.
    """
    size, norms, norm = rest.norm(dim=-1), named.norm(dim=-1), x.norm(dim=-1)
    total, most = norms.sum(1, keepdim=True), norms.amax(1) if norms.shape[1] else torch.zeros_like(norm)
    if ranks is not None:
        total, most = ranks.sum(total), ranks.max(most)
    relative = size / torch.maximum(most, norm).clamp_min(torch.finfo(norm.dtype).tiny)
    rounding = relative <= _explained(torch.finfo(rest.dtype).eps)
    rounding |= (relative <= _explained(given) / 2).all() if at_once else relative <= _explained(given)
    rounding &= size <= 0.01 * norm
    if ranks is not None:
        rounding = ranks.min(rounding.int()).bool()
    if not rounding.any():
        return False
    shares = torch.where(rounding[:, None], norms / total.clamp_min(torch.finfo(norms.dtype).tiny), 0.0)
    named.addcmul_(rest[:, None], shares[..., None])
    rest[rounding] = 0.0
    return True


def _explained(eps: float) -> float:
    """Return the relative size of a rest that rounding to a dtype of this eps explains."""
    return eps if eps > 1e-4 else eps**0.75
