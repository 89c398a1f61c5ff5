"""The trace of one forward pass: everything that the decomposition holds frozen (DESIGN.md section 2).

It is recorded by :mod:`depass_fast.trace.capture`. N² attention probabilities are not part of it: they are recomputed
from Q, K and the kind of mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import InitVar, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..adapters import Attention, LayerStreams, RoutedExpert
from ..adapters.weights import Mlp
from ..runtime.brief import brief, brief_repr
from ..runtime.dtypes import dtype_name
from ..runtime.memory import readable
from .mixers import KeyedTrace, RecurrenceTrace
from .source import TraceSource


@dataclass
class AttentionTrace:
    """Frozen attention of one layer: q (T, H, d) and k (T, Hkv, d) after rotary embedding, and the mask's kind.

    The logits are ``scale`` · q·k, capped at ± ``softcap``, plus ``key_bias``. All masks are causal. In sparse
    attention queries see their ``chosen_keys`` alone. Where attention has sinks (logits of nothing), P's rows sum to
    less than one: P is the softmax without the sinks, times ``row_sum``. Where a router chooses heads, that is its
    weight, or zero. With ``minus``, P is the softmax of the first
    half of the heads of q, less so many times that of the second: differential attention.
    """

    resid: Tensor  # (T, D) the residual stream that values are read from, that of layer `source` if there is one
    q: Tensor
    k: Tensor
    scale: float
    window: int | None = None  # a query sees the `window` last positions, itself included
    chunked: bool = False  # of these, only those of its own chunk of `window` positions
    softcap: float | None = None
    minus: float | None = None
    key_bias: Tensor | None = None  # (T, H) in float32 or wider, added to the logits of a key (ALiBi, up to a constant)
    chosen_keys: Tensor | None = None  # (T, K) int32, positions, or entries, of the prompt that are selected; -1: none
    key_block: int | None = None  # they are blocks of so many positions, (T, Hkv, K), for every KV head
    row_sum: Tensor | None = None  # (T, H) sums of P's rows in float32 or wider; None: all one
    latent_scale: Tensor | None = None  # (T,) s of the norm behind the latent, if values come from one
    head_scales: Tensor | None = None  # (T, Hkv) s of a norm of every head's values, in float32 or wider
    value_ratio: Tensor | None = None  # (T, Hkv·d) clamped / raw values, where any was clamped, or act(c) / c
    out_scale: Tensor | None = None  # (T,) s of the norm on its output
    out_ratio: Tensor | None = None  # (T, H·d) frozen factors of what the heads give: gates, norms
    recurrence: RecurrenceTrace | None = None  # in the place of the softmax: q and k are its own
    keyed: KeyedTrace | None = None  # values are keys: they are turned, and some stand for several positions
    # of one run, and not recorded: the allocation that shares out the activation of a recurrence's values, which is
    # otherwise frozen at `value_ratio`
    value_rule: Any = None
    beside: AttentionTrace | None = None  # of the first heads, which have a softmax beside a recurrence
    out_constant: Tensor | None = None  # (T, H·d) what is added behind these factors: a norm's β, gated
    constant_heads: Tensor | None = None  # (T, H·d) what heads make of constants, where that is not the same everywhere
    source: int | None = None  # the layer whose keys and values it takes

    __repr__ = brief_repr

    def __post_init__(self) -> None:
        self._constants: dict[torch.dtype, Tensor | None] = {}  # the same at all positions; by dtype

    def first_seen(self, query: int) -> int:
        """The first position of its prompt that a query at local position ``query`` sees."""
        if self.window is None:
            return 0
        return query // self.window * self.window if self.chunked else max(0, query + 1 - self.window)

    @property
    def is_mixed(self) -> bool:
        """True if more than probabilities mixes positions: a recurrence, or what turns keys that are values."""
        return self.recurrence is not None or self.keyed is not None

    @property
    def is_plain(self) -> bool:
        """True if values and what heads give are not scaled by channel, and probabilities alone mix them."""
        return self.value_ratio is None and self.out_ratio is None and not self.is_mixed

    def value_scale(self, weights: Attention, resid: Tensor) -> Tensor:
        """The frozen scale of every value, given the residual stream ``resid`` that is read: (T, D) -> (T,).

        With a norm of every head's values it is one for each KV head: (T, Hkv).
        """
        scale = weights.scale(resid)
        scale = scale if self.latent_scale is None else scale * self.latent_scale.to(scale)
        return scale if self.head_scales is None else scale[:, None] * self.head_scales.to(scale)

    def constant(self, weights: Attention, at: slice | Tensor, dtype: torch.dtype) -> Tensor | None:
        """The constant that attention adds to packed positions ``at``, if no value is clamped: (D,), (N, D) or None.

        It is not yet through a norm of the residual stream.
        """
        if not weights.has_bias:  # also those of the same model that leave its biases out
            return None
        if self.value_rule is not None:  # constants of values drive the activation, among the components
            return weights.written_constant(
                weights.o.bias, None if self.out_scale is None else self.out_scale[at], dtype
            )
        if self.constant_heads is not None:
            raw = self.constant_heads[at].to(dtype) @ weights.w_o.to(dtype).T
            raw = raw if weights.o.bias is None else raw + weights.o.bias.to(dtype)
            return weights.written_constant(raw, None if self.out_scale is None else self.out_scale[at], dtype)
        if self.out_scale is None and self.row_sum is None:
            if dtype not in self._constants:
                self._constants[dtype] = weights.constant(dtype)
            return self._constants[dtype]
        scale, sums = (None if x is None else x[at] for x in (self.out_scale, self.row_sum))
        return weights.constant(dtype, scale, sums)


@dataclass
class MlpTrace:
    """The frozen activations of one MLP, or of one expert.

    ``positions`` (P,) are the packed positions that were sent to the expert, None for all (P = T).
    """

    resid: Tensor  # (T, D) the residual stream that it reads
    gate: Tensor  # (P, I) gate pre-activation
    act: Tensor  # (P, I) frozen activation: act(gate) · up · the router's weight, what the down projection reads
    part: int = 0  # its number among the layer's MLPs
    positions: Tensor | None = None
    out_scale: Tensor | None = None  # (T,) s of the norm on its output
    out_ratio: Tensor | None = None  # (T, D) frozen factors of its output
    router_weight: Tensor | None = None  # (P,) the factor of an expert's output
    factor: Tensor | None = None  # (P, I) that of an activation: the token's embedding behind a gate of it
    inner_scale: Tensor | None = None  # (T,) s of a norm between the activation and the down projection
    input_weight: Tensor | None = None  # (P,) the factor of what an expert reads, behind the norm
    source: int | None = None  # the layer whose MLP's input it reads, where that is an earlier one
    copied_positions: InitVar[np.ndarray | None] = None  # `positions` in host memory, if they are there already

    __repr__ = brief_repr

    def __post_init__(self, copied_positions: np.ndarray | None) -> None:
        self._copied = self.positions, copied_positions

    @staticmethod
    def of_expert(expert: RoutedExpert, **common: Any) -> MlpTrace:
        """The trace of one expert; ``common`` holds ``resid``, ``out_scale`` and ``source``."""
        return MlpTrace(
            gate=expert.gate,
            act=expert.act,
            part=expert.part,
            positions=expert.positions,
            router_weight=expert.router_weight,
            input_weight=expert.input_weight,
            copied_positions=expert.host_positions,
            **common,
        )

    @property
    def host_positions(self) -> np.ndarray | None:
        """``positions`` in host memory, so that no device is waited for. They are copied only if they were replaced."""
        positions, copied = self._copied
        if positions is not self.positions or copied is None:
            copied = None if self.positions is None else self.positions.cpu().numpy()
            self._copied = self.positions, copied
        return copied

    def constant(self, weights: Mlp, at: slice | Tensor, dtype: torch.dtype) -> Tensor | None:
        """The constant that it writes at packed positions ``at``, its bias as routed: (D,), or (N, D), or None.

        It is not yet through any norm. A slice may hold positions that were not sent here, a tensor (N,) may not.
        """
        bias = weights.down.bias
        if bias is None or self.router_weight is None:
            return None if bias is None else bias.to(dtype)
        weight = self.dense(self.router_weight, at) if isinstance(at, slice) else self.router_weight[self.rows(at)]
        return weight[:, None].to(dtype) * bias.to(dtype)

    def scaled(self, scale: Tensor, packed: Tensor) -> Tensor:
        """The norm's ``scale`` (S,) at ``packed`` positions (S,), times the factor of what an expert reads."""
        weight = self.input_weight
        return scale if weight is None else scale * weight[self.rows(packed)].to(scale)

    def behind(self, weights: Mlp, rows: Tensor | slice, dtype: torch.dtype) -> Tensor | None:
        """The frozen factors behind the activation at some ``rows``, (S, 1) or (S, I); None where there are none.

        They are an expert's router weight, a norm in front of the down projection, or the token's embedding behind a
        gate of it. ``act`` holds them.
        """
        if self.factor is not None:
            return self.factor[rows].to(dtype)
        if self.inner_scale is not None and weights.inner is not None:
            scale = self.inner_scale[rows, None].to(dtype)
            return (
                scale.expand(-1, self.act.shape[1])
                if weights.inner.weight is None
                else scale * weights.inner.weight.to(dtype)
            )
        return None if self.router_weight is None else self.router_weight[rows, None].to(dtype)

    def rows(self, packed: Tensor) -> Tensor:
        """The rows of ``gate`` and ``act`` that hold ``packed`` positions (S,), all of which were sent here."""
        return packed if self.positions is None else torch.searchsorted(self.positions, packed)

    def dense(self, values: Tensor, span: slice) -> Tensor:
        """``values`` (P, ...) recorded here, at packed positions ``span``: (N, ...), zero at those not sent here."""
        if self.positions is None or self.host_positions is None:
            return values[span]
        here = slice(*np.searchsorted(self.host_positions, (span.start, span.stop)).tolist())
        out = values.new_zeros(span.stop - span.start, *values.shape[1:])
        out[self.positions[here] - span.start] = values[here]
        return out


@dataclass
class LayerTrace:
    """The record of one layer, in the model's dtype and on the layer's device.

    ``attention`` is None and ``mlps`` empty in a layer without. ``mlps`` holds the MLP, or the experts that any
    position was sent to. ``attention_sum`` and ``mlp_sum`` (T, D) are inputs of norms of the residual stream itself.
    """

    resid_pre: Tensor  # (T, D) entering the layer
    resid_mid: Tensor  # (T, D) after its attention; in a parallel layer, with the output of attention alone
    attention: AttentionTrace  # None where there is none: most callers ask layers that have it
    mlps: tuple[MlpTrace, ...]
    attention_sum: Tensor | None = None
    mlp_sum: Tensor | None = None
    streams: LayerStreams | None = None  # of several residual streams, which lie side by side in `resid_pre`
    spreads: bool = False  # what a branch writes reaches later positions, too

    __repr__ = brief_repr

    @property
    def mlp(self) -> MlpTrace:
        """The only MLP, or one of the experts."""
        return self.mlps[0]

    def mlp_constant(self, mlps: tuple[Mlp, ...], span: slice, dtype: torch.dtype) -> Tensor | None:
        """The constant that the layer's ``mlps`` together add to packed positions ``span``: (D,), or (N, D), or None.

        It is not yet through a norm of the residual stream.
        """
        if not self.mlps:
            return None
        each = [part.constant(mlps[part.part], span, dtype) for part in self.mlps]
        each = [constant for constant in each if constant is not None]
        raw, scale = (sum(each[1:], each[0]) if each else None), self.mlp.out_scale
        return mlps[0].written_constant(raw, None if scale is None else scale[span], dtype)

    def tensors(self) -> Iterator[Tensor]:
        """Every recorded tensor, some of them more than once."""
        recurrence = None if self.attention is None else self.attention.recurrence
        beside = None if self.attention is None else self.attention.beside
        keyed = None if self.attention is None else self.attention.keyed
        for held in (self, self.attention, recurrence, beside, keyed, *self.mlps):
            if held is None:
                continue
            named = vars(held).items()
            own = ("skip", "rates", "distances", "sinks")  # of the model, not of a position
            yield from (value for name, value in named if isinstance(value, Tensor) and name not in own)
        yield from () if self.streams is None else self.streams.tensors()


@dataclass
class Trace:
    """One forward pass over P packed prompts of T positions in all.

    ``offsets`` (P + 1,) holds the first packed position of every prompt. ``resid_final`` (T, D) is the residual
    stream after the last layer, ``normed_final`` (T, D) the same after the final norm.
    """

    input_ids: Tensor
    offsets: np.ndarray
    layers: list[LayerTrace]
    resid_final: Tensor
    normed_final: Tensor
    source: TraceSource
    batch: bool = False  # made of a list of prompts, even if of only one
    collapsed: Tensor | None = None  # (T, D) of several streams, what the final norm reads
    end_read: Tensor | None = None  # (T, n) the weights of the streams in it

    def __repr__(self) -> str:
        lengths, x = brief([self.length(prompt) for prompt in range(self.n_prompts)]), self.resid_final
        where = f"{len(self.layers)} layers of width {x.shape[1]}, {dtype_name(x.dtype)} on {x.device}"
        return f"Trace(prompts of {lengths} tokens, {where}, {readable(self.nbytes)}, {self.source!r})"

    @property
    def n_prompts(self) -> int:
        return len(self.offsets) - 1

    def span(self, prompt: int) -> slice:
        """The packed positions of one prompt."""
        return slice(int(self.offsets[prompt]), int(self.offsets[prompt + 1]))

    def length(self, prompt: int) -> int:
        return int(self.offsets[prompt + 1] - self.offsets[prompt])

    def resid(self, layer: int) -> Tensor:
        """The residual stream entering ``layer``, (T, D); with ``layer`` = L, that after the last layer."""
        return self.resid_final if layer == len(self.layers) else self.layers[layer].resid_pre

    @property
    def before_norm(self) -> Tensor:
        """The input of the final norm, (T, D): the last residual stream, or several brought together."""
        return self.resid_final if self.collapsed is None else self.collapsed

    def resid_at(self, layer: int, site: str) -> Tensor:
        """The residual stream at a site of ``layer``: `resid_pre`, `resid_mid` or `resid_post`. (T, D)."""
        return self.layers[layer].resid_mid if site == "resid_mid" else self.resid(layer + (site == "resid_post"))

    @property
    def nbytes(self) -> int:
        """The memory that the trace holds, in bytes. It grows with the number of positions, not with its square."""
        held = [x for x in vars(self).values() if isinstance(x, Tensor)]
        held += [t for x in self.layers for t in x.tensors()]
        return sum({(t.data_ptr(), t.shape): t.numel() * t.element_size() for t in held}.values())
