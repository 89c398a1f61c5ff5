"""One layer of several residual streams: in front of a branch they become rows of D, behind it they are mixed.

The backend's operations know rows of D alone, or of r·D where attention reads several streams side by side. They add
to rows of zeros of D, and what these hold then is written to the streams, which are mixed in place, some rows at a time
(DESIGN.md section 10).
"""

from __future__ import annotations

from collections.abc import Sequence

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

AT_ONCE = {True: 1 << 20, False: 1 << 26}  # numbers of streams that are mixed at a time, on a CPU and elsewhere


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
        rows = _mixed(here.rows, layer, at, None)
        _add_written(rows, here, layer, record, step)
        return ComponentState(rows, here.layout, state.layer)
    source = read_rows(state, step) if layer.attention.source is None else values
    assert source is not None  # see above
    zeros = _zeros(source, state, state.rows.shape[1] // step.count)
    given = run.operations.aggregate_ov(zeros, layer.attention, run.frozen(record.attention), queries, source)
    del source
    return ComponentState(_mixed(here.rows, layer, at, given.rows), here.layout, state.layer)


def through_mlps(
    state: ComponentState, layer: Layer, record: LayerTrace, maps: LayerStreams, run: Run
) -> ComponentState:
    """Return the state after the MLP or the experts, and after a gate of the token's embedding behind them."""
    first = [part for part in record.mlps if not layer.mlps[part.part].follows]
    last = [part for part in record.mlps if layer.mlps[part.part].follows]
    if maps.mlp is None:
        return state
    state = _through(state, layer, first, maps.mlp, run)
    return state if maps.gate is None else _through(state, layer, last, maps.gate, run)


def _through(
    state: ComponentState, layer: Layer, parts: Sequence[MlpTrace], step: StreamStep, run: Run
) -> ComponentState:
    """Return the state after ``parts`` that read the same streams, and write to the same."""
    source = read_rows(state, step)
    given = _zeros(source, state, state.rows.shape[1] // step.count)
    for part in parts:
        given = share_out(given, source, layer.mlps[part.part], part, run)
    del source
    return ComponentState(_mixed(state.rows, None, step.at(_positions(state)), given.rows), state.layout, state.layer)


def read_rows(state: ComponentState, step: StreamStep) -> ComponentState:
    """Return what a branch reads of every component, as rows of D, or of r·D."""
    return ComponentState(step.at(_positions(state)).reads(state.rows), state.layout, state.layer, state.site)


def collapsed(state: ComponentState, end: StreamEnd) -> ComponentState:
    """Return the state of what the final norm reads of several streams, as rows of D."""
    return ComponentState(end.of(state.rows, _positions(state)), state.layout, state.layer, state.site)


def _positions(state: ComponentState) -> Tensor:
    """Return the packed position (R,) of every row."""
    layout, device = state.layout, state.device  # the tables stay there with the layout
    return layout.tensor("packed", device).index_select(0, layout.tensor("segment_of", device))


def _zeros(like: ComponentState, state: ComponentState, width: int) -> ComponentState:
    """Return rows of zeros of a ``width``, in host memory that is pinned where that of ``state`` is."""
    shape = len(like.rows), width
    if state.device.type == "cpu" and state.rows.is_pinned():
        return ComponentState(empty_on_host(shape, like.rows.dtype, True).zero_(), like.layout, state.layer)
    return ComponentState(like.rows.new_zeros(shape), like.layout, state.layer)


def _mixed(rows: Tensor, layer: Layer | None, at: StreamStep, given: Tensor | None) -> Tensor:
    """Return the streams behind a branch that gives (R, D), at the positions ``at`` of their rows: (R, m·D).

    ``layer`` is that of attention, beside which there may be a linear map. ``rows`` (R, n·D) are used up.
    """
    width = at.write.shape[1] * (rows.shape[1] // at.count)
    out = rows if width == rows.shape[1] else rows.new_empty(len(rows), width)
    size = max(1, AT_ONCE[rows.device.type == "cpu"] // rows.shape[1])
    for first in range(0, len(rows), size):
        part = slice(first, min(first + size, len(rows)))
        here = at.at(part)
        passed = _passed(rows[part], layer, here)
        if given is not None:
            _add(passed, given[part], here)
        if passed.data_ptr() != out[part].data_ptr():
            out[part] = passed
    return out


def _passed(rows: Tensor, layer: Layer | None, at: StreamStep) -> Tensor:
    """Return streams (R, n·D) behind a branch, without what it gives, but with the linear map beside attention."""
    out = at.passes(rows)
    if layer is not None and layer.side is not None and at.side is not None:
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
    before = record.resid_pre.to(rows, copy=True)
    written = record.resid_mid.to(rows) - _passed(before, layer, step)
    packed = to_device(state.layout.packed, state.device)
    rows[to_device(state.layout.extra_rows(BIAS), rows.device)] += written[packed]
