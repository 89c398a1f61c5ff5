"""The outputs that one layer's modules add to the residual stream: of heads, of neurons and as a whole.

An output passes the branch's own norm and factor, and a norm of the residual stream itself where there is one. The
scales of these norms are frozen, so that heads and neurons pass them one by one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from ..adapters import Adapter, Attention, Branch, Mlp, Norm
from ..adapters.streams import StreamStep
from ..state.state import Factors
from ..trace.attention import span_probabilities
from ..trace.keyed import frozen_mixing
from ..trace.record import AttentionTrace, LayerTrace, MlpTrace, Trace

_TILE = 1 << 22  # probabilities or outputs held at once, in elements


@lru_cache(maxsize=8)
def _numerals(count: int) -> tuple[str, ...]:
    """The numbers 0, 1, ... as text. They are kept, as neurons need them anew in every layer."""
    return tuple(map(str, range(count)))


class LayerOutputs:
    """The outputs of layer ``layer`` on one prompt, computed in ``dtype``. A ``module`` is "attention" or "mlp".

    ``prompt`` None stands for all prompts, one after the other, of which :meth:`at` are the outputs on one.
    """

    def __init__(self, adapter: Adapter, trace: Trace, layer: int, prompt: int | None, dtype: torch.dtype) -> None:
        self._adapter, self._layer, self.dtype = adapter, layer, dtype
        self.record: LayerTrace = trace.layers[layer]
        self.span = slice(0, int(trace.offsets[-1])) if prompt is None else trace.span(prompt)
        self.after = trace.resid(layer + 1)
        self._lengths = np.diff(trace.offsets if prompt is None else trace.offsets[prompt : prompt + 2]).tolist()

    def at(self, span: slice) -> LayerOutputs:
        """The outputs on the prompt at ``span``, with the weights that were looked up for all."""
        other = copy.copy(self)
        other.span, other._lengths = span, [span.stop - span.start]
        return other

    @cached_property
    def attention(self) -> Attention:
        return self._adapter.attention(self._layer)

    @cached_property
    def mlps(self) -> tuple[Mlp, ...]:
        return self._adapter.mlps(self._layer)

    def values(self) -> Tensor:
        """The values that every KV head gives, without their constant part: (N, Hkv, d)."""
        weights, record = self.attention, self.record.attention
        x = record.resid[self.span].to(self.dtype)
        if weights.front is not None:
            constant = weights.front.constant(self._lengths, x)
            x = x if constant is None else x - constant
        normed = x if weights.norm is None else weights.norm.normed(x)
        values = normed @ weights.w_v.to(self.dtype).T
        if record.latent_scale is not None:
            values = values * record.latent_scale[self.span, None].to(self.dtype)
        if record.head_scales is not None:
            values = values.unflatten(-1, (weights.n_kv_heads, -1)) * record.head_scales[self.span, :, None].to(values)
            values = values.flatten(-2)
        return self._clamped(values)

    def attend(self, values: Tensor, out: Tensor) -> None:
        """Write every head's output for values (N, Hkv, d) to ``out`` (N, H, D): P, then W_O."""
        weights = self.attention
        w_o = weights.w_o.to(self.dtype).unflatten(1, (weights.n_heads, weights.head_dim)).permute(1, 2, 0)  # (H, d, D)
        for queries, mixed in self.mixed(values, out.shape[-1]):
            torch.bmm(mixed, w_o, out=out[queries].transpose(0, 1))

    def mixed(self, values: Tensor, width: int = 0) -> Iterator[tuple[slice, Tensor]]:
        """Yield what the output projection reads of every head for values (N, Hkv, d): queries, and (H, Q, d) at these.

        Neither their probabilities nor numbers of a ``width`` per head are more than a few MiB.
        """
        weights, n, record = self.attention, len(values), self.record.attention
        assert record is not None  # it mixes positions
        if record.is_mixed:
            mixing = frozen_mixing(weights, record, self.span, self.dtype)
            yield slice(0, n), mixing.forward(values.flatten(1)[:, None]).view(n, weights.n_heads, -1).transpose(0, 1)
            return
        values = values.transpose(0, 1)  # (Hkv, N, d)
        # a few queries at a time: N² probabilities are held nowhere, and all outputs would be a second state
        size = max(1, _TILE // (weights.n_heads * max(n, width)))
        for first in range(0, n, size):
            queries = slice(first, min(first + size, n))
            p = span_probabilities(record, self.span, queries, self.dtype)  # (H, Q, N)
            mixed = p.unflatten(0, (len(values), -1)).flatten(1, 2) @ values  # (Hkv, G·Q, d)
            mixed = mixed.view(weights.n_heads, -1, weights.head_dim)
            if record.out_ratio is not None:
                ratio = record.out_ratio[self.span][queries].to(mixed)
                mixed = mixed * ratio.unflatten(1, (weights.n_heads, -1)).transpose(0, 1)
            yield queries, mixed

    def constant_heads(self) -> Tensor | None:
        """The part of what the output projection reads that is made of constants alone: (N, H, d), or None."""
        weights, record, n = self.attention, self.record.attention, self.span.stop - self.span.start
        if not weights.has_bias:  # also those of the same model that leave its biases out
            return None
        if record.constant_heads is not None:
            return record.constant_heads[self.span].to(self.dtype).unflatten(-1, (weights.n_heads, -1))
        value = None if record.is_mixed else weights.value_constant(self.dtype)
        if value is None:
            return None
        if record.value_ratio is not None:  # it is clamped with the rest of the value
            return torch.cat([part.transpose(0, 1) for _, part in self.mixed(self._clamped(value.expand(n, -1)))])
        groups = weights.n_heads // weights.n_kv_heads
        heads = value.view(weights.n_kv_heads, -1).repeat_interleave(groups, 0).expand(n, -1, -1)
        return heads if record.row_sum is None else heads * record.row_sum[self.span, :, None].to(heads)

    def entering(self, y: Tensor, module: str) -> Tensor:
        """Raw outputs (N, M, D) of a module as they enter the stream."""
        branch, record = self._of(module)
        scale = None if record.out_scale is None else record.out_scale[self.span]
        y = branch.written(y, scale)
        y = y if branch.spread is None else branch.spread.along(y)
        return self.through_stream(y, module) if self.record.streams is None else self._step(module).writes(y)

    def whole(self, module: str) -> Tensor:
        """The whole output that a module adds to the stream, without its constant part: (N, D)."""
        record = self.record
        if record.streams is not None:
            return self._whole_of_streams(module)
        before = record.resid_pre if module == "attention" else record.resid_mid
        after = record.resid_mid if module == "attention" else self.after
        stream, constant = self._stream(module), self._linear_constant(module)
        if stream is not None and stream.is_factor:
            y = after[self.span].to(self.dtype) - stream.apply(before[self.span].to(self.dtype), None)
            y = y if stream.bias is None else y - stream.bias.to(y)
            return y if constant is None else y - constant
        total = record.attention_sum if module == "attention" else record.mlp_sum  # before a norm of the stream
        keeps = self._of(module)[0].keeps
        y = (after if total is None else total)[self.span].to(self.dtype) / keeps - before[self.span].to(self.dtype)
        y = self.through_stream(y, module)
        return y if constant is None else y - constant

    def constant(self, module: str) -> Tensor | None:
        """The constant part of what a module adds, as it is in the stream behind it: (D,), or (N, D), or None."""
        stream, constant = self._stream(module), self._linear_constant(module)
        if self.record.streams is not None:
            return None if constant is None else self._spread(constant, module)
        if stream is None or stream.bias is None:
            return constant
        beta = stream.bias.to(self.dtype)
        return beta if constant is None else constant + beta

    def through_stream(self, y: Tensor, module: str) -> Tensor:
        """A part of the stream, (N, ..., D) or (D,), after factor and norm of the stream behind a module, without β."""
        if self.record.streams is not None:
            return self._step(module).mixed(y[:, None])[:, 0] if module == "attention" or self.mlps else y
        stream = self._stream(module)
        if module != "mlp" or self.mlps:
            keeps = self._of(module)[0].keeps
            y = y if keeps == 1.0 else y * keeps
        if stream is None or stream.is_factor:
            return y if stream is None else stream.apply(y, None)
        resid = self.record.attention_sum if module == "attention" else self.record.mlp_sum
        assert resid is not None  # it is recorded wherever there is such a norm
        scale = stream.scale(resid[self.span].to(self.dtype))
        return stream.apply(y.expand(len(scale), -1) if y.ndim == 1 else y, scale)

    def _step(self, module: str) -> StreamStep:
        """The frozen maps of a module to and from several streams, at the prompt's positions."""
        streams = self.record.streams
        assert streams is not None
        step = streams.attention if module == "attention" else streams.mlp
        assert step is not None  # the layer has that module
        return step.at(self.span)

    def _spread(self, y: Tensor, module: str) -> Tensor:
        """Return what a module writes to one stream of D, (D,) or (N, D), as it writes it to several: (N, n·D)."""
        step = self._step(module)
        return step.writes(y.expand(len(step.write), -1) if y.ndim == 1 else y)

    def _whole_of_streams(self, module: str) -> Tensor:
        """:meth:`whole` where there are several streams: what these gain behind their mix."""
        record, step, constant = self.record, self._step(module), self.constant(module)
        before = (record.resid_pre if module == "attention" else record.resid_mid)[self.span].to(self.dtype)
        after = (record.resid_mid if module == "attention" else self.after)[self.span].to(self.dtype)
        y, side = after - step.passes(before), self._adapter.side(self._layer) if module == "attention" else None
        if side is not None and step.side is not None:
            y = y - step.writes(side.of(step.reads(before), step.side.to(before)))
        if module == "mlp" and record.streams is not None and record.streams.entering is not None:
            y = y - record.streams.entering[self.span].to(y)
        return y if constant is None else y - constant

    @property
    def has_parts(self) -> bool:
        """True if a neuron's output is no product of a number and a vector: see :meth:`parts`."""
        return self.record.streams is not None or any(part.out_ratio is not None for part in self.record.mlps)

    def parts(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return activations (N, I), vectors (I, D) and weights (N, n) of several streams, for every MLP reached.

        A neuron's output is the product of all three. With a factor by channel the weights are (N, 1, D).
        """
        streams, found = self.record.streams, []
        if streams is None:
            for part in (self.record.mlps[index] for index in self.reached()):
                w_down, numbers = self._written_factors(self.mlps[part.part], part, part.dense(part.act, self.span))
                assert part.out_ratio is not None
                found.append((numbers, w_down.T, part.out_ratio[self.span, None].to(self.dtype)))
            return found
        for part in (self.record.mlps[index] for index in self.reached()):
            mlp = self.mlps[part.part]
            step = streams.gate if mlp.follows else streams.mlp
            assert step is not None
            w_down, numbers = self._written_factors(mlp, part, part.dense(part.act, self.span))
            found.append((numbers, w_down.T, step.write[self.span].to(self.dtype)))
        return found

    def back_through_stream(self, y: Tensor, module: str, position: int | None = None) -> Tensor:
        """Gradients (..., N, D) behind factor and norm of the stream, or (D,) at one ``position``, taken in front."""
        stream = self._stream(module)
        if module != "mlp" or self.mlps:
            keeps = self._of(module)[0].keeps
            y = y if keeps == 1.0 else y * keeps
        if stream is None or stream.is_factor:
            return y if stream is None else stream.transposed(y, None)
        resid = self.record.attention_sum if module == "attention" else self.record.mlp_sum
        assert resid is not None  # it is recorded wherever there is such a norm
        rows = resid[self.span] if position is None else resid[self.span][position]
        return stream.transposed(y, stream.scale(rows.to(self.dtype)))

    def neurons(self, prefix: str) -> tuple[tuple[str, ...], Factors]:
        """The names and products of all neurons of the MLP, or of the experts that any position was sent to."""
        numbers, vectors = [], []
        for part in (self.record.mlps[index] for index in self.reached()):
            mlp, act = self.mlps[part.part], part.dense(part.act, self.span)
            stored, numbers_of_part = mlp.w_down, act
            if mlp.output is not None or mlp.factor != 1.0 or mlp.keeps != 1.0 or mlp.stream is not None:
                stored, numbers_of_part = self._written_factors(mlp, part, act)
            numbers.append(numbers_of_part)
            vectors.append(stored.T)
        names = self.neuron_names(prefix)
        if len(vectors) == 1:
            return names, Factors(numbers[0], vectors[0])
        return names, Factors(torch.cat(numbers, 1), torch.cat(vectors))

    def neuron_names(self, prefix: str) -> tuple[str, ...]:
        """The names of :meth:`neurons`."""
        names: list[str] = []
        for part in (self.record.mlps[index] for index in self.reached()):
            names += map(f"{prefix}{self.mlps[part.part].name}N".__add__, _numerals(part.act.shape[1]))
        return tuple(names)

    def reached(self) -> list[int]:
        """The places in the record of the MLP, or of the experts that any position of the prompt was sent to."""
        span, every = (self.span.start, self.span.stop), enumerate(self.record.mlps)
        sent = ((index, part.host_positions) for index, part in every)
        return [i for i, at in sent if at is None or np.diff(np.searchsorted(at, span)).any()]

    def _written_factors(self, mlp: Mlp, part: MlpTrace, act: Tensor) -> tuple[Tensor, Tensor]:
        """W_down and activations (N, I) with the norms and factors between a neuron and the stream in them."""
        w_down, numbers = mlp.writing(mlp.w_down, self.dtype), act.to(self.dtype) * mlp.keeps
        if part.out_scale is not None:
            numbers = numbers * part.out_scale[self.span, None].to(self.dtype)
        if mlp.stream is not None and mlp.stream.is_factor:
            return mlp.stream.apply(w_down.T, None).T, numbers
        if mlp.stream is not None and self.record.mlp_sum is not None:
            numbers = numbers * mlp.stream.scale(self.record.mlp_sum[self.span].to(self.dtype))[:, None]
            w_down = mlp.stream.apply(w_down.T, None).T
        return w_down, numbers

    def _linear_constant(self, module: str) -> Tensor | None:
        if module == "attention":
            constant = self._attention_constant()
        else:
            constant = self.record.mlp_constant(self.mlps, self.span, self.dtype)
        spread = None if module == "mlp" and not self.mlps else self._of(module)[0].spread
        if spread is not None and constant is not None:
            constant = spread.along(constant.expand(self.span.stop - self.span.start, -1))
        through = self.record.streams is None and constant is not None
        return self.through_stream(constant, module) if through and constant is not None else constant

    def _attention_constant(self) -> Tensor | None:
        weights, record = self.attention, self.record.attention
        clamped = record.value_ratio is not None and not record.is_mixed
        value = None if not clamped else weights.value_constant(self.dtype)
        if value is None:
            return record.constant(weights, self.span, self.dtype)
        # it is clamped with the rest of the value, and so differs from position to position
        heads = self.after.new_empty(len(self.after[self.span]), weights.n_heads, self.after.shape[1], dtype=self.dtype)
        self.attend(self._clamped(value.expand(len(heads), -1)), heads)
        raw = heads.sum(1) if weights.o.bias is None else heads.sum(1) + weights.o.bias.to(self.dtype)
        scale = None if record.out_scale is None else record.out_scale[self.span]
        return weights.written_constant(raw, scale, self.dtype)

    def _clamped(self, values: Tensor) -> Tensor:
        """A part of the values (N, Hkv·d), scaled as the clamping scaled the whole: (N, Hkv, d)."""
        weights, record = self.attention, self.record.attention
        ratio = record.value_ratio
        values = values if ratio is None or record.is_mixed else values * ratio[self.span].to(self.dtype)
        return values.unflatten(-1, (weights.n_kv_heads, weights.head_dim))

    def _stream(self, module: str) -> Norm | None:
        """The norm of the stream behind a module; None where there is none, or no such module."""
        return None if module == "mlp" and not self.mlps else self._of(module)[0].stream

    def _of(self, module: str) -> tuple[Branch, AttentionTrace | MlpTrace]:
        if module == "attention":
            return self.attention, self.record.attention
        return self.mlps[0], self.record.mlp
