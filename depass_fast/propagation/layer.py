"""One layer of the propagation: attention, then the MLP or the experts, each a step of the backend."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..adapters import Layer, Mlp, Norm
from ..components.base import Entry
from ..labels import BIAS
from ..runtime.transfer import to_device
from ..state.layout import Layout
from ..state.state import ComponentState
from ..trace.record import LayerTrace, MlpTrace
from . import streams
from .copies import copy_state
from .earlier import EarlierStates
from .gated import behind_gate
from .mlps import share_out
from .run import Run


def through_layer(
    state: ComponentState,
    layer: Layer,
    record: LayerTrace,
    run: Run,
    queries: Layout | None = None,
    earlier: EarlierStates | None = None,
) -> ComponentState:
    """Return the state after ``layer``, at all positions or at those of ``queries``; ``state`` is used up.

    ``earlier`` keeps the states that later layers read once more, and has those that this one reads.
    """
    index, values = state.layer, None
    if earlier is not None:
        earlier.meet(state, Entry(index, "resid_pre"), record)
        values = earlier.values(layer)
    state, source = through_attention(state, layer, record, run, queries, values)
    if earlier is not None:
        earlier.meet(state, Entry(index, "resid_mid"), record)
    return through_mlp(state, source, layer, record, run, earlier)


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
    that starts after the attention only loses the positions that are not asked for. ``values`` is the state that an
    earlier layer read, where this one takes its values; None where the components started behind it: then the attention
    is a constant for them.
    """
    if state.site == "resid_mid" or layer.attention is None or record.attention is None:
        return (state if queries is None else state.at(queries)), None
    given = record.attention
    if run.value_rule is not None and given.recurrence is not None and given.value_ratio is not None:
        record = replace(record, attention=replace(given, value_rule=run.value_rule))
    if record.streams is not None:
        return streams.through_attention(state, layer, record, record.streams.attention, run, queries, values), None
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
    if weights.has_gated_norm:
        values, weights, attention = behind_gate(state if values is None else values, weights, attention)
    state = run.operations.aggregate_ov(state, weights, attention, queries, values)
    normalise(state, layer.attention.stream, record.attention_sum, layer.attention.keeps)
    return state, source


def through_mlp(
    state: ComponentState,
    source: ComponentState | None,
    layer: Layer,
    record: LayerTrace,
    run: Run,
    earlier: EarlierStates | None = None,
) -> ComponentState:
    """Return the state after the MLP or the experts of ``layer``. They read ``source``; None: the state itself.

    Experts that read ahead of their layer read one of the ``earlier`` states. For components that started behind it,
    what they write is a constant.
    """
    if record.streams is not None:
        state = streams.through_mlps(state, layer, record, record.streams, run)
        state.layer, state.site, state.factors = state.layer + 1, "resid_pre", None
        return state
    mlps, here = list(layer.mlps), [part for part in record.mlps if part.source is None]
    if here and layer.mlp.has_gated_norm:  # all of a mixture read through one norm
        source, one, part = behind_gate(state if source is None else source, layer.mlp, here[0])
        mlps = [replace(mlp, norm=one.norm) for mlp in mlps]
        here = [replace(each, resid=part.resid, copied_positions=each.host_positions) for each in here]
    elif source is None and sum(not mlps[part.part].follows for part in here) > 1:
        # experts must not read one another
        source = copy_state(state)
    for part in here:
        mlp = mlps[part.part]
        source = None if mlp.follows else source
        state = share_out(state, source, mlp, part, run)
    for part in record.mlps:
        if part.source is None:
            continue
        ahead = None if earlier is None else earlier.ahead(part.source)
        if ahead is None:
            _add_outputs(state, layer.mlps[part.part], part)
            continue
        if len(ahead.layout.counts) != len(state.layout.counts):
            ahead = ahead.at(state.layout)
        state = share_out(state, ahead, layer.mlps[part.part], part, run)
    if layer.mlps:
        normalise(state, layer.mlp.stream, record.mlp_sum, layer.mlp.keeps)
    state.layer, state.site, state.factors = state.layer + 1, "resid_pre", None
    return state


def _add_outputs(state: ComponentState, mlp: Mlp, part: MlpTrace) -> None:
    """Add all that one MLP, or one expert, writes to `bias`, in place."""
    state.factors = None
    if state.layout.index(BIAS) is None:  # chosen components may lack it
        return
    at = slice(None) if part.positions is None else part.positions
    out_scale, dtype = None if part.out_scale is None else part.out_scale[at], state.rows.dtype
    written = mlp.written(part.act.to(dtype) @ mlp.w_down.to(dtype).T, out_scale)
    whole = part.dense(written, slice(0, len(part.resid))).to(state.rows)
    packed = to_device(state.layout.packed, state.device)
    state.rows[to_device(state.layout.extra_rows(BIAS), state.device)] += whole[packed]


def _add_written(state: ComponentState, record: LayerTrace) -> None:
    """Add all that the attention writes to `bias`, in place."""
    state.factors = None
    if state.layout.index(BIAS) is None:  # chosen components may lack it
        return
    written = record.resid_mid.to(state.rows) - record.resid_pre.to(state.rows)
    packed = to_device(state.layout.packed, state.device)
    state.rows[to_device(state.layout.extra_rows(BIAS), state.device)] += written[packed]


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
