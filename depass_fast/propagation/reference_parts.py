"""The reference backend's operations on excerpts of a state: the numbers that :mod:`.verify` compares with.

The reference computes one position at a time, in float64 where there is room, and what it holds is bounded. Attention
is recomputed for a few components: components do not meet there. The MLP is recomputed for all of them, a block of
neurons at a time: a neuron's allocation depends on no other neuron.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..adapters import Attention, Linear, Mlp, Norm
from ..allocation import Allocation
from ..backends import ReferenceBackend
from ..runtime.memory import available
from ..runtime.transfer import to_device
from ..state.layout import Components, Layout
from ..state.state import ComponentState
from ..trace.record import AttentionTrace, MlpTrace

REFERENCE_BYTES = 512 << 20  # memory that the reference works in, and that its results take until they are compared


def reference_attention(
    state: ComponentState,
    weights: Attention,
    trace: AttentionTrace,
    prompt: int,
    position: int,
    chosen: np.ndarray,
    source: ComponentState | None = None,
) -> Tensor:
    """Return the components ``chosen`` (C,) at a position of a prompt after the attention: (C, D)."""
    segments = np.flatnonzero(state.layout.prompt == prompt)[: position + 1]  # later positions are not seen
    heads = (2 * weights.n_heads + weights.n_kv_heads) * weights.head_dim
    held = len(segments) * (4 * state.rows.shape[1] + heads)  # numbers per component
    dtype = _dtype(weights.w_v.device, held)
    size = max(1, REFERENCE_BYTES // (held * dtype.itemsize))
    if trace.value_rule is not None:  # components meet in the values' activation: all are needed, at once
        every = np.arange(len(state.layout.components[prompt]))
        given = (segments, every, weights.w_v.device, dtype)
        part, read = _excerpt(state, *given), None if source is None else _excerpt(source, *given)
        here = Layout.of(part.layout.components, part.layout.packed[:1], [np.array([position])])
        return ReferenceBackend().aggregate_ov(part, weights, trace, here, read).rows[to_device(chosen, state.device)]
    parts = []
    for first in range(0, len(chosen), size):
        excerpt = (segments, chosen[first : first + size], weights.w_v.device, dtype)
        part, read = _excerpt(state, *excerpt), None if source is None else _excerpt(source, *excerpt)
        here = Layout.of(part.layout.components, part.layout.packed[:1], [np.array([position])])
        parts.append(ReferenceBackend().aggregate_ov(part, weights, trace, here, read).rows)
    return torch.cat(parts)


def reference_mlp(
    state: ComponentState,
    source: ComponentState,
    weights: Mlp,
    trace: MlpTrace,
    allocation: Allocation,
    segment: int,
) -> Tensor:
    """Return all components at a segment after the MLP, which reads ``source``: (count, D), in float32 at least."""
    device, at = weights.w_gate.device, np.array([segment])
    every = np.arange(len(state.layout.components[state.layout.prompt[segment]]))
    width, n_neurons = state.rows.shape[1], weights.w_gate.shape[0]
    held = 8 * len(every) + 3 * width  # numbers per neuron
    dtype = _dtype(device, 8 * len(every) * width + 16 * held)
    size = max(16, REFERENCE_BYTES // (held * dtype.itemsize))
    read = _excerpt(source, at, every, device, dtype)
    out = _excerpt(state, at, every, device, dtype)
    for first in range(0, n_neurons, size):
        neurons = slice(first, first + size)
        some_weights = _some_neurons(weights, neurons, constants=first == 0)
        factor = None if trace.factor is None else trace.factor[:, neurons]
        some_trace = replace(trace, gate=trace.gate[:, neurons], act=trace.act[:, neurons], factor=factor)
        out = ReferenceBackend().allocate_mlp(out, some_weights, some_trace, allocation, read)
    narrow = dtype == torch.float32 or state.rows.dtype != torch.float64
    return out.rows.to(torch.float32 if narrow else torch.float64)  # held while the backend works


def reference_readout(
    state: ComponentState, norm: Norm | None, resid: Tensor, directions: Tensor, segment: int
) -> Tensor:
    """Return the readout of all components at a segment: (count, K)."""
    count, width = int(state.layout.counts[segment]), state.rows.shape[1]
    dtype = _dtype(state.device, 4 * width)
    size, parts = max(1, REFERENCE_BYTES // (4 * width * dtype.itemsize)), []
    for first in range(0, count, size):
        chosen = np.arange(first, min(first + size, count))
        part = _excerpt(state, np.array([segment]), chosen, state.device, dtype)
        parts.append(ReferenceBackend().read_out(part, norm, resid, directions))
    return torch.cat(parts)


def _excerpt(
    state: ComponentState, segments: np.ndarray, chosen: np.ndarray, device: torch.device, dtype: torch.dtype
) -> ComponentState:
    """Copy the components ``chosen`` (C,) at some segments (S',) of one prompt: a state of that prompt alone."""
    layout = state.layout
    whole = layout.components[layout.prompt[segments[0]]]
    extras = tuple(whole.extras[m] for m in chosen if m < len(whole.extras))
    components = Components(extras, (), whole.births[chosen], whole.excluded[chosen])
    local, origin = layout.local[segments], layout.packed[segments[:1]] - layout.local[segments[:1]]
    alive = chosen < layout.counts[segments][:, None]  # (S', C)
    rows = (layout.starts[segments][:, None] + chosen)[alive]
    values = copy_rows(state, rows).to(device, dtype)
    return ComponentState(values, Layout.of((components,), origin, [local]), state.layer, state.site)


def copy_rows(state: ComponentState, rows: np.ndarray) -> Tensor:
    """Copy some rows (r,) of a state: (r, D)."""
    return state.rows[to_device(rows, state.device)]


@dataclass(frozen=True)
class _Projection:
    """A linear map of some neurons, with the attributes of a projection that the reference reads."""

    weight: Tensor
    bias: Tensor | None


def _rows(linear: Linear, neurons: slice) -> _Projection:
    """Return a projection to some of the neurons."""
    return _Projection(linear.weight[neurons], None if linear.bias is None else linear.bias[neurons])


def _some_neurons(weights: Mlp, neurons: slice, constants: bool) -> Mlp:
    """Return an MLP of some of the neurons, with the constants that it writes or without."""
    output, gate = weights.output, _rows(weights.gate, neurons)
    up = None if weights.up is None else _rows(weights.up, neurons)
    down = _Projection(weights.w_down[:, neurons], weights.down.bias if constants else None)
    if output is not None and not constants:
        output = replace(output, bias=None)
    return replace(weights, gate=gate, up=up, down=down, output=output)


def _dtype(device: torch.device, numbers: int) -> torch.dtype:
    """Return float64, or float32 if the device has no float64 or no room for so many ``numbers``."""
    free = available(device)
    fits = free is None or torch.float64.itemsize * numbers + REFERENCE_BYTES <= free
    return torch.float64 if device.type != "mps" and fits else torch.float32
