"""One layer of the propagation: attention, then the MLP or the experts, each a step of the backend."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..adapters import Layer, Norm
from ..labels import BIAS
from ..runtime.memory import empty_on_host
from ..runtime.transfer import to_device
from ..state.layout import Layout
from ..state.state import ComponentState
from ..trace.record import LayerTrace
from .gated import behind_gate
from .run import Run


def through_layer(
    state: ComponentState,
    layer: Layer,
    record: LayerTrace,
    run: Run,
    queries: Layout | None = None,
    values: ComponentState | None = None,
) -> ComponentState:
    """Return the state after ``layer``, at all positions or at those of ``queries``; ``state`` is used up.

    ``values`` is the state that an earlier layer read, where this one takes its values; None where the components
    started behind it.
    """
    state, source = through_attention(state, layer, record, run, queries, values)
    return through_mlp(state, source, layer, record, run)


def through_attention(
    state: ComponentState,
    layer: Layer,
    record: LayerTrace,
    run: Run,
    queries: Layout | None = None,
    values: ComponentState | None = None,
) -> tuple[ComponentState, ComponentState | None]:
    """Return the state after the attention of ``layer``, at all positions or at those of ``queries``.

    The second result is the state that the MLP reads; None if it reads the first one. ``state`` is used up. A state
    that starts after the attention only loses the positions that are not asked for. ``values`` as of
    :func:`through_layer`: without them, the attention is a constant for a state that started behind its values.
    """
    if state.site == "resid_mid" or layer.attention is None or record.attention is None:
        return (state if queries is None else state.at(queries)), None
    if layer.attention.source is not None and values is None:
        state = state if queries is None else state.at(queries)
        _add_written(state, record)
        return state, None
    source = None
    if layer.parallel:
        source = copy_state(state) if queries is None else state.at(queries)
    if queries is None and not (layer.mlps and layer.mlp.has_gated_norm):  # a streamed MLP reads another state then
        run.operations.expect(layer, record, run.allocation)
    attention, weights = record.attention, layer.attention
    if run.value_rule is not None and attention.recurrence is not None and attention.value_ratio is not None:
        attention = replace(attention, value_rule=run.value_rule)
    if weights.has_gated_norm:
        values, weights, attention = behind_gate(state if values is None else values, weights, attention)
    state = run.operations.aggregate_ov(state, weights, attention, queries, values)
    normalise(state, layer.attention.stream, record.attention_sum, layer.attention.keeps)
    return state, source


def through_mlp(
    state: ComponentState, source: ComponentState | None, layer: Layer, record: LayerTrace, run: Run
) -> ComponentState:
    """Return the state after the MLP or the experts of ``layer``. They read ``source``; None: the state itself."""
    gated, parts = bool(layer.mlps) and layer.mlp.has_gated_norm, record.mlps
    if source is None and not gated and sum(not layer.mlps[part.part].follows for part in parts) > 1:
        # experts must not read one another
        source = copy_state(state)
    mlps = list(layer.mlps)
    if gated and parts:  # all of a mixture read through one norm
        source, one, part = behind_gate(state if source is None else source, layer.mlp, parts[0])
        mlps = [replace(mlp, norm=one.norm) for mlp in mlps]
        parts = [replace(each, resid=part.resid, copied_positions=each.host_positions) for each in parts]
    for part in parts:
        mlp = mlps[part.part]
        source = None if mlp.follows else source
        if part.host_positions is None:
            state = run.operations.allocate_mlp(state, mlp, part, run.allocation, source)
            continue
        segments = np.flatnonzero(np.isin(state.layout.packed, part.host_positions))
        if len(segments):
            read = None if source is None else source.take(segments)
            state.put(run.operations.allocate_mlp(state.take(segments), mlp, part, run.allocation, read), segments)
    if layer.mlps:
        normalise(state, layer.mlp.stream, record.mlp_sum, layer.mlp.keeps)
    state.layer, state.site, state.factors = state.layer + 1, "resid_pre", None
    return state


def _add_written(state: ComponentState, record: LayerTrace) -> None:
    """Add all that the attention writes to `bias`, in place."""
    state.factors = None
    if state.layout.index(BIAS) is None:  # chosen components may lack it
        return
    written = record.resid_mid.to(state.rows) - record.resid_pre.to(state.rows)
    packed = to_device(state.layout.packed, state.device)
    state.rows[to_device(state.layout.extra_rows(BIAS), state.device)] += written[packed]


def copy_state(state: ComponentState) -> ComponentState:
    """Return a copy of a state, pinned in host memory where that is."""
    rows = state.rows
    pinned = rows.device.type == "cpu" and rows.is_pinned()
    copy = empty_on_host(rows.shape, rows.dtype, pinned) if pinned else torch.empty_like(rows)
    return ComponentState(copy.copy_(rows), state.layout, state.layer, state.site)


def normalise(state: ComponentState, norm: Norm | None, resid: Tensor | None, keeps: float = 1.0) -> None:
    """Multiply every component by ``keeps`` and apply a norm of the residual stream itself, in place.

    The norm's scale is frozen at ``resid`` (T, D), the sum of all components.
    """
    if keeps != 1.0:
        state.rows.mul_(keeps)
    if norm is None:
        return
    if norm.is_factor and norm.weight is not None:
        state.rows.mul_(norm.weight.to(state.rows))
        _add_beta(state, norm)
        return
    assert resid is not None, "a norm of the residual stream was not recorded"
    layout, rows = state.layout, state.rows
    packed = to_device(layout.packed[layout.row_segments()], rows.device)
    if norm.centred:
        rows.sub_(rows.mean(-1, keepdim=True))
    rows.mul_(norm.scale(resid.to(rows))[packed, None].to(rows.dtype))
    if norm.weight is not None:
        rows.mul_(norm.weight.to(rows))
    _add_beta(state, norm)


def _add_beta(state: ComponentState, norm: Norm) -> None:
    """Add a norm's β to `bias`, in place."""
    layout, rows = state.layout, state.rows
    if norm.bias is not None and layout.index(BIAS) is not None:  # chosen components may lack `bias`
        rows[to_device(layout.extra_rows(BIAS), rows.device)] += norm.bias.to(rows)
