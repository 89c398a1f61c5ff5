"""Branches that read a mixture of two positions (RWKV): components are mixed in front, so a backend sees one state.

What such an MLP gives has a factor by channel, which is applied behind it (DESIGN.md section 10).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..adapters import Layer
from ..adapters.shift import Shift
from ..labels import BIAS
from ..runtime.memory import empty_on_host
from ..runtime.transfer import to_device
from ..state.layout import Layout
from ..state.state import ComponentState
from ..trace.record import LayerTrace
from .mlps import share_out
from .run import Run

AT_ONCE = {True: 1 << 20, False: 1 << 23}  # numbers of a state that are mixed at a time, on a CPU and elsewhere


def read_shifted(state: ComponentState, front: Shift, resid: Tensor, queries: Layout | None = None) -> ComponentState:
    """Return what a branch reads of every component, at all positions or at those of ``queries``.

    ``resid`` (T, D) is the sum of the components of ``state``.
    """
    layout, device = queries or state.layout, state.device
    norm = front.norm.to(device)
    scale, mu = norm.scale(resid.to(state.rows)).to(state.rows), front.weight.to(state.rows)
    here = np.arange(len(layout.counts)) if queries is None else state.layout.find(queries)
    before = np.maximum(here - 1, 0)
    has_before = layout.local > 0
    rows = _empty(state, layout.n_rows)
    for part in _parts(layout, state.rows):
        z = norm.apply(*_rows(state, here[part], scale))
        out = rows[layout.starts[part.start] : layout.starts[part.stop]]
        torch.mul(z, mu, out=out)
        some = part.start + np.flatnonzero(has_before[part])
        if len(some):
            earlier = norm.apply(*_rows(state, before[some], scale))
            places = _places(layout.starts[some] - layout.starts[part.start], state.layout.counts[before[some]])
            out.index_add_(0, to_device(places, device), earlier.mul_(1 - mu))
    if norm.bias is not None and layout.index(BIAS) is not None:  # chosen components may lack `bias`
        beta = norm.bias.to(rows) * mu + to_device(has_before, device)[:, None] * (norm.bias.to(rows) * (1 - mu))
        rows[to_device(layout.extra_rows(BIAS), device)] += beta
    return ComponentState(rows, layout, state.layer, state.site)


def through_mlp(
    state: ComponentState, layer: Layer, record: LayerTrace, run: Run, queries: Layout | None = None
) -> ComponentState:
    """Return the state after an MLP behind a shift, at all positions or at those of ``queries``."""
    mlp, part = layer.mlp, record.mlp
    assert mlp.front is not None
    source = read_shifted(state, mlp.front, record.resid_mid, queries)
    state = state if queries is None else state.at(queries)
    given = ComponentState(_empty(source, len(source.rows)).zero_(), source.layout, state.layer, state.site)
    given = share_out(given, source, replace(mlp, front=None), part, run)
    del source
    state.factors, layout = None, state.layout
    ratio = None if part.out_ratio is None else part.out_ratio.to(state.rows)
    packed = layout.tensor("packed", state.device)
    for at in _parts(layout, state.rows):
        rows = slice(layout.starts[at.start], layout.starts[at.stop])
        segment = to_device(layout.row_segments(at), state.device)
        written = given.rows[rows]
        state.rows[rows] += written if ratio is None else written * ratio[packed[segment]]
    return state


def _parts(layout: Layout, like: Tensor) -> list[slice]:
    """Cut segments into neighbours with so few rows, ``like`` these, that a few copies may be held beside a state."""
    ends, parts, first = layout.starts[1:], [], 0
    size = max(1, AT_ONCE[like.device.type == "cpu"] // like.shape[1])
    while first < len(ends):
        most = layout.starts[first] + size
        last = max(first + 1, int(np.searchsorted(ends, most, side="right")))
        parts.append(slice(first, last))
        first = last
    return parts


def _rows(state: ComponentState, segments: np.ndarray, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return a copy of the rows of some segments, and the norm's scale of each."""
    layout, device = state.layout, state.device
    rows = state.rows[to_device(layout.rows_of(segments), device)]
    packed = to_device(np.repeat(layout.packed[segments], layout.counts[segments]), device)
    return rows, scale[packed]


def _places(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the numbers of runs of rows, given the first of each and how many they are."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1]) + np.repeat(starts - (ends - counts), counts)


def _empty(like: ComponentState, count: int) -> Tensor:
    """Return so many rows, in host memory that is pinned where those of a state are."""
    rows = like.rows
    if rows.device.type == "cpu" and rows.is_pinned():
        return empty_on_host(torch.Size((count, rows.shape[1])), rows.dtype, True)
    return rows.new_empty(count, rows.shape[1])
