"""The trace of a layer of several residual streams, made of what was recorded of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..adapters import Adapter, ExpertAssignment
from .mlp_traces import mlp_traces
from .record import AttentionTrace, LayerTrace


def layer_of_streams(
    adapter: Adapter,
    index: int,
    record: dict[str, Any],
    attention: AttentionTrace,
    assignment: ExpertAssignment | None,
    after: Tensor,
) -> LayerTrace:
    """Make a layer's trace of what was recorded. ``after`` (T, n·D) are the streams behind the layer."""
    maps, mid = adapter.streams(index).layer(adapter.block(index), record, adapter.side(index))
    if maps.gate is not None:  # it writes to none of what it reads
        record["gate_resid"] = maps.gate.reads(after)
    mlps = mlp_traces(adapter, index, record, assignment, record["resid_mid"]) if adapter.has_mlp(index) else ()
    return LayerTrace(record["streams_pre"], after if mid is None else mid, attention, mlps, streams=maps)
