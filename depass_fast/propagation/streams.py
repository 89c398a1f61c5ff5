"""One layer of several residual streams: in front of a branch they become rows of D, behind it they are mixed.

The backend's operations know rows of D alone. They add to rows of zeros, and what these hold then is written to the
streams (DESIGN.md section 10).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..adapters import Layer
from ..adapters.streams import LayerStreams, StreamEnd, StreamStep
from ..labels import BIAS
from ..runtime.memory import empty_on_host
from ..runtime.transfer import to_device
from ..state.layout import Layout
from ..state.state import ComponentState
from ..trace.record import LayerTrace, MlpTrace
from .mlps import share_out
from .run import Run


def through_attention(
    state: ComponentState,
    layer: Layer,
    record: LayerTrace,
    step: StreamStep,
    run: Run,
    queries: Layout | None,
    values: ComponentState | None,
) -> ComponentState:
    """Return the state after attention; arguments as of :func:`depass_fast.propagation.layer.through_attention`.

    ``values`` are rows of D already, what the layer that has them reads.
    """
    here = state if queries is None else state.at(queries)
    at = step.at(_positions(here))
    if layer.attention.source is not None and values is None:  # a constant: its values are no components'
        rows = _passed(here.rows, layer, at)
        _add_written(rows, here, layer, record, step)
        return ComponentState(rows, here.layout, state.layer)
    own = read_rows(state, step) if layer.attention.source is None else None
    source = values if own is None else own
    assert source is not None  # see above
    given = run.operations.aggregate_ov(_zeros(source, state), layer.attention, record.attention, queries, source)
    rows = _passed(here.rows, layer, at)
    _add(rows, given.rows, at)
    return ComponentState(rows, here.layout, state.layer)


def through_mlps(
    state: ComponentState, layer: Layer, record: LayerTrace, maps: LayerStreams, run: Run
) -> ComponentState:
    """Return the state after the MLP or the experts, and after a gate of the token's embedding behind them."""
    first = [part for part in record.mlps if not layer.mlps[part.part].follows]
    last = [part for part in record.mlps if layer.mlps[part.part].follows]
    state = _through(state, layer, first, maps.mlp, run)
    return state if maps.gate is None else _through(state, layer, last, maps.gate, run)


def _through(
    state: ComponentState, layer: Layer, parts: Sequence[MlpTrace], step: StreamStep, run: Run
) -> ComponentState:
    """Return the state after ``parts`` that read the same streams, and write to the same."""
    source = read_rows(state, step)
    given = _zeros(source, state)
    for part in parts:
        given = share_out(given, source, layer.mlps[part.part], part, run)
    at = step.at(_positions(state))
    rows = at.passes(state.rows)
    _add(rows, given.rows, at)
    return ComponentState(rows, state.layout, state.layer)


def read_rows(state: ComponentState, step: StreamStep) -> ComponentState:
    """Return what a branch reads of every component, as rows of D."""
    return ComponentState(step.at(_positions(state)).reads(state.rows), state.layout, state.layer, state.site)


def collapsed(state: ComponentState, end: StreamEnd) -> ComponentState:
    """Return the state of what the final norm reads of several streams, as rows of D."""
    return ComponentState(end.of(state.rows, _positions(state)), state.layout, state.layer, state.site)


def _positions(state: ComponentState) -> Tensor:
    """Return the packed position (R,) of every row."""
    layout, device = state.layout, state.device  # the tables stay there with the layout
    return layout.tensor("packed", device).index_select(0, layout.tensor("segment_of", device))


def _zeros(like: ComponentState, state: ComponentState) -> ComponentState:
    """Return rows of zeros, in host memory that is pinned where that of ``state`` is."""
    rows = like.rows
    if state.device.type == "cpu" and state.rows.is_pinned():
        return ComponentState(empty_on_host(rows.shape, rows.dtype, True).zero_(), like.layout, state.layer)
    return ComponentState(torch.zeros_like(rows), like.layout, state.layer)


def _passed(rows: Tensor, layer: Layer, at: StreamStep) -> Tensor:
    """Return streams (R, n·D) behind attention, without what that gives, but with the linear map beside it."""
    out = at.passes(rows)
    if layer.side is not None and at.side is not None:
        _add(out, layer.side.of(at.reads(rows), at.side.to(rows)), at)
    return out


def _add(rows: Tensor, given: Tensor, at: StreamStep) -> None:
    """Add what a branch gives (R, D) to the streams (R, m·D), in place."""
    weight = at.write.to(rows)[..., None]  # (R, m, 1)
    rows.view(len(rows), weight.shape[1], -1).baddbmm_(weight, given[:, None])


def _add_written(rows: Tensor, state: ComponentState, layer: Layer, record: LayerTrace, step: StreamStep) -> None:
    """Add all that attention writes to `bias`, in place; chosen components may lack it."""
    if state.layout.index(BIAS) is None:
        return
    before = record.resid_pre.to(rows)
    written = record.resid_mid.to(rows) - _passed(before, layer, step)
    packed = to_device(state.layout.packed, state.device)
    rows[to_device(state.layout.extra_rows(BIAS), rows.device)] += written[packed]
