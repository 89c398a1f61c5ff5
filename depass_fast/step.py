"""One layer of the propagation: attention, then the MLP or the experts, each a step of the backend."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .adapters import Layer, Norm
from .options import Run
from .state import BIAS, ComponentState, Layout
from .trace import LayerTrace


def through_layer(
    state: ComponentState, layer: Layer, record: LayerTrace, run: Run, queries: Layout | None = None
) -> ComponentState:
    """The state after ``layer``, at all positions or at those of ``queries``. ``state`` is used up."""
    source = None
    if state.site == "resid_pre":
        if layer.parallel:  # attention must not be read by the MLP
            source = ComponentState(state.rows.clone(), state.layout, state.layer)
            source = source if queries is None else source.at(queries)
        state = run.backend.aggregate_ov(state, layer.attention, record.attention, queries)
        normalise(state, layer.attention.stream, record.attention_sum)
    elif queries is not None:
        state = state.at(queries)
    if source is None and len(record.mlps) > 1:  # experts must not read one another
        source = ComponentState(state.rows.clone(), state.layout, state.layer)
    for part in record.mlps:
        mlp = layer.mlps[part.part]
        if part.positions is None:
            state = run.backend.allocate_mlp(state, mlp, part, run.allocation, source)
            continue
        sent = np.flatnonzero(np.isin(state.layout.packed, part.positions.cpu().numpy()))
        if len(sent):
            some = state.layout.only(sent)
            done = run.backend.allocate_mlp(state.at(some), mlp, part, run.allocation, source and source.at(some))
            state.put(done)
    normalise(state, layer.mlp.stream, record.mlp_sum)
    state.layer, state.site, state.factors = state.layer + 1, "resid_pre", None
    return state


def normalise(state: ComponentState, norm: Norm | None, resid: Tensor | None) -> None:
    """Apply a norm of the residual stream itself to every component, its scale frozen at ``resid`` (T, D); in place."""
    if norm is None:
        return
    layout, rows = state.layout, state.rows
    packed = torch.from_numpy(layout.packed[layout.row_segments()]).to(rows.device)
    if norm.centred:
        rows.sub_(rows.mean(-1, keepdim=True))
    rows.mul_(norm.scale(resid.to(rows))[packed, None].to(rows.dtype))
    if norm.weight is not None:
        rows.mul_(norm.weight.to(rows))
    if norm.bias is not None:
        rows[torch.from_numpy(layout.extra_rows(BIAS)).to(rows.device)] += norm.bias.to(rows)
