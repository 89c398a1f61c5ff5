"""The first positions of a trace: what a readout there needs, since attention never looks ahead."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from ..runtime.transfer import to_device
from .record import AttentionTrace, LayerTrace, MlpTrace, Trace

_Cut = Callable[[Tensor], Tensor]


def first_positions(trace: Trace, counts: Sequence[int]) -> Trace:
    """Return the trace of the first ``counts`` positions of every prompt.

    One prompt's record is a view of the old one; of several packed prompts the positions are copied.
    """
    lengths = np.diff(trace.offsets)
    if np.array_equal(lengths, counts):
        return trace
    starts, offsets = trace.offsets[:-1], np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    kept = np.concatenate([np.arange(start, start + n) for start, n in zip(starts, counts, strict=True)])
    cut = _cut(kept)
    return replace(
        trace,
        input_ids=cut(trace.input_ids),
        offsets=offsets,
        layers=[_layer(layer, cut, kept) for layer in trace.layers],
        resid_final=cut(trace.resid_final),
        normed_final=cut(trace.normed_final),
        **_cut_fields(trace, cut, "collapsed", "end_read"),
    )


def _cut(kept: np.ndarray) -> _Cut:
    """Return the function that keeps the packed positions ``kept`` of a tensor (T, ...), and makes no copy twice."""
    first = int(kept[0]), len(kept)
    is_range = np.array_equal(kept, np.arange(first[0], first[0] + first[1]))
    done: dict[int, tuple[Tensor, Tensor]] = {}  # the residual stream is recorded under several names

    def cut(x: Tensor) -> Tensor:
        if id(x) not in done:
            done[id(x)] = x, x.narrow(0, *first) if is_range else x[to_device(kept, x.device)]
        return done[id(x)][1]

    return cut


def _layer(layer: LayerTrace, cut: _Cut, kept: np.ndarray) -> LayerTrace:
    mlps = [_mlp(mlp, cut, kept) for mlp in layer.mlps]
    return replace(
        layer,
        **_cut_fields(layer, cut, "resid_pre", "resid_mid", "attention_sum", "mlp_sum"),
        attention=layer.attention and _attention(layer.attention, cut),
        mlps=tuple(mlp for mlp in mlps if mlp is not None),
        streams=None if layer.streams is None else layer.streams.cut(cut),
    )


def _attention(attention: AttentionTrace, cut: _Cut) -> AttentionTrace:
    scales = ("latent_scale", "head_scales", "value_ratio", "out_scale", "out_ratio", "out_constant", "constant_heads")
    recurrence = attention.recurrence
    if recurrence is not None:
        fields = ("decay", "write", "own", "in_ratio", "relative")
        recurrence = replace(recurrence, **_cut_fields(recurrence, cut, *fields))
    keyed = attention.keyed
    if keyed is not None:
        keyed = replace(keyed, **_cut_fields(keyed, cut, "cos", "sin", "entries"))
    beside = attention.beside
    if beside is not None:
        beside = replace(beside, **_cut_fields(beside, cut, "resid", "q", "k"))
    kept = _cut_fields(attention, cut, "resid", "q", "k", "key_bias", "chosen_keys", "row_sum", *scales)
    return replace(attention, recurrence=recurrence, keyed=keyed, beside=beside, **kept)


def _mlp(mlp: MlpTrace, cut: _Cut, kept: np.ndarray) -> MlpTrace | None:
    """Return what one MLP, or one expert, does at ``kept`` positions; None if none of them was sent to it."""
    common = _cut_fields(mlp, cut, "resid", "out_scale", "out_ratio")
    if mlp.host_positions is None:
        names = ("gate", "act", "router_weight", "input_weight", "inner_scale", "factor")
        cuts = _cut_fields(mlp, cut, *names)
        return MlpTrace(**cuts, part=mlp.part, source=mlp.source, **common)
    rows = np.flatnonzero(np.isin(mlp.host_positions, kept))
    if not len(rows):
        return None
    positions = np.searchsorted(kept, mlp.host_positions[rows])
    at = to_device(rows, mlp.gate.device)
    return MlpTrace(
        gate=mlp.gate[at],
        act=mlp.act[at],
        part=mlp.part,
        source=mlp.source,
        positions=to_device(positions, mlp.gate.device),
        router_weight=None if mlp.router_weight is None else mlp.router_weight[at],
        input_weight=None if mlp.input_weight is None else mlp.input_weight[at],
        copied_positions=positions,
        **common,
    )


def _cut_fields(record: Any, cut: _Cut, *names: str) -> dict[str, Any]:
    held = {name: getattr(record, name) for name in names}
    return {name: None if x is None else cut(x) for name, x in held.items()}
