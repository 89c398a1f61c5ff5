"""The consistency check of several residual streams: branches read of them, and write to them, as is frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..adapters import Adapter, Branch
from ..adapters.streams import StreamStep
from .consistency import READING, Consistency, experts_written, normed, rows
from .record import LayerTrace, Trace


def check_streams(adapter: Adapter, trace: Trace, records: Sequence[dict[str, Any]], positions: Sequence[int]) -> None:
    """Compare, at the packed ``positions``, the streams with what their frozen maps make of what was recorded.

    Raises:
        RuntimeError: naming the layer and the module, and what it should be.
    """
    if adapter.family.streams is None:
        return
    found, at = Consistency(), torch.tensor(positions, device="cpu")
    for index, record in enumerate(records):
        _check_attention(found, adapter, index, trace.layers[index], record, at)
        if adapter.has_mlp(index):
            _check_mlps(found, adapter, index, trace, record, at)
    end = adapter.stream_end(trace.end_read)
    assert end is not None  # it was recorded with the streams
    ours = end.of(trace.resid_final)
    found.compare(
        "the final norm reads something else of the residual streams", trace.before_norm, ours.to(trace.before_norm)
    )
    found.verdict()


def _check_attention(
    found: Consistency, adapter: Adapter, index: int, layer: LayerTrace, record: dict[str, Any], at: Tensor
) -> None:
    assert layer.streams is not None
    name, step = f"layer {index}: {adapter.path(index, 'attention')}", _at(layer.streams.attention, at)
    before, written = rows(layer.resid_pre, at), record["attention_written"]
    _check_read(found, name, rows(record["resid_pre"], at), step, before)
    total = step.passes(before) + step.writes(_written(adapter.attention(index), written))
    side = adapter.side(index)
    if side is not None and step.side is not None:
        total = total + step.writes(side.of(step.reads(before), step.side.to(before)))
    _check_gain(found, name, rows(layer.resid_mid, at), total, before)


def _check_mlps(
    found: Consistency, adapter: Adapter, index: int, trace: Trace, record: dict[str, Any], at: Tensor
) -> None:
    layer, mlps = trace.layers[index], adapter.mlps(index)
    assert layer.streams is not None and layer.streams.mlp is not None  # the layer has an MLP
    name, step = f"layer {index}: {adapter.path(index, 'mlp')}", _at(layer.streams.mlp, at)
    before = rows(layer.resid_mid, at)
    _check_read(found, name, rows(layer.mlp.resid, at), step, before)
    first = tuple(part for part in layer.mlps if not mlps[part.part].follows)
    mixture = adapter.is_mixture(index)
    raw = experts_written(layer, mlps, at, first) if mixture else record["mlp_written"]
    total = step.passes(before) + step.writes(_written(mlps[0], raw))
    for part in layer.mlps:
        gate = layer.streams.gate
        if mlps[part.part].follows and gate is not None:
            gate = _at(gate, at)
            _check_read(found, f"{name} is followed by a gate that", rows(part.resid, at), gate, total)
            raw = experts_written(layer, mlps, at, (part,))
            total = gate.passes(total) + gate.writes(_written(mlps[part.part], raw))
    if layer.streams.entering is not None:  # what the next layer embeds
        total = total + rows(layer.streams.entering, at).to(total)
    _check_gain(found, name, rows(trace.resid(index + 1), at).to(total), total, before, READING if mixture else None)


def _at(step: StreamStep, at: Tensor) -> StreamStep:
    return step.at(at.to(step.read.device))


def _written(branch: Branch, raw: Tensor) -> Tensor:
    """Return what a branch gives to the streams, of its raw output (S, D)."""
    return (normed(branch.output, raw) * branch.factor).to(raw)


def _check_read(found: Consistency, name: str, read: Tensor, step: StreamStep, streams: Tensor) -> None:
    found.compare(f"{name} reads something else of the residual streams", read, step.reads(streams).to(read), streams)


def _check_gain(
    found: Consistency, name: str, after: Tensor, expected: Tensor, before: Tensor, tolerance: float | None = None
) -> None:
    what = f"{name} writes something else than what the residual streams gain there"
    found.compare(what, after, expected.to(after), before, tolerance=tolerance)
