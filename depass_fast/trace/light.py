"""A trace without what only propagation reads: the residual stream is left, and who was sent where."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from .record import LayerTrace, MlpTrace, Trace


def light(trace: Trace) -> Trace:
    """Return a trace for components that are read off a ledger; it is sampled, as one that a user holds.

    Gates, activations, queries and keys keep their shapes and nothing else, except the attention of clamped values,
    whose constants need it.
    """
    model = None if trace.source.model is None else trace.source.model()
    source = trace.source if model is None or trace.source.sample is not None else trace.source.sampled(model)
    return replace(trace, layers=[_layer(layer) for layer in trace.layers], source=source)


def _layer(layer: LayerTrace) -> LayerTrace:
    attention = layer.attention
    if attention is not None and attention.value_ratio is None:
        attention = replace(attention, q=_empty(attention.q), k=_empty(attention.k))
    return replace(layer, attention=attention, mlps=tuple(map(_mlp, layer.mlps)))


def _mlp(mlp: MlpTrace) -> MlpTrace:
    held = {"gate": _empty(mlp.gate), "act": _empty(mlp.act)}
    return replace(mlp, **held, copied_positions=mlp.host_positions)


def _empty(x: Tensor) -> Tensor:
    """Return a tensor of the same shape that holds nothing and takes no memory."""
    return x.new_empty(()).expand(x.shape)
