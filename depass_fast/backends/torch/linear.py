"""The linear rules for the torch backend: a chunk of positions at a time, with no component looking at another one."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ...adapters import Mlp
from ...labels import BIAS
from ...linear_rules import LinearShares, linear_shares
from ...runtime.products import accumulate, product, write_product
from ...runtime.transfer import all_to_device
from ...state.layout import Layout
from ...state.state import ComponentState
from ...trace.record import MlpTrace
from .blocks import Chunk
from .mlp import runs
from .workspace import Workspace


@dataclass(frozen=True, eq=False)
class Recorded:
    """The rows of an MLP's trace that segments read: ``rows`` (S,), of which ``unique`` (U,) are all there are.

    States that are carried together read the same rows. Then ``places`` (S,) are those among the unique ones, in host
    memory, and ``index`` (S,) the same on the device; both are None where every segment reads a row of its own.
    """

    rows: Tensor
    unique: Tensor
    places: np.ndarray | None = None
    index: Tensor | None = None

    @staticmethod
    def of(layout: Layout, trace: MlpTrace, device: torch.device) -> Recorded:
        rows = trace.rows(layout.tensor("packed", device))
        packed, places = np.unique(layout.packed, return_inverse=True)
        if len(packed) == len(places):
            return Recorded(rows, rows)
        unique, index = all_to_device([packed, places], device)
        return Recorded(rows, trace.rows(unique), places, index)

    def positions(self, trace: MlpTrace) -> Tensor:
        """The packed positions of the unique rows (U,)."""
        return self.unique if trace.positions is None else trace.positions[self.unique]

    def span(self, segments: slice) -> slice:
        """The unique rows that some of the segments read, and those in between."""
        if self.places is None:
            return segments
        places = self.places[segments]
        return slice(int(places.min()), int(places.max()) + 1)


@dataclass(eq=False)
class LinearStep:
    """One layer's MLP under a linear ``rule``: scale (S,), w_gate and w_up (I, D), w_down (D, I) as it writes.

    ``up`` (U, I) is the frozen up projection at the unique ``recorded`` rows. It and ``w_up`` are None where the rule
    does not look at it. ``out_scale`` (S,) is s of a norm on the output, or None. Coefficients of ``most`` positions
    are held at a time, or of all that are asked for together.
    """

    rule: str
    weights: Mlp
    trace: MlpTrace
    scale: Tensor
    w_gate: Tensor
    w_up: Tensor | None
    w_down: Tensor
    recorded: Recorded
    up: Tensor | None
    out_scale: Tensor | None
    most: int
    _held: tuple[slice, LinearShares] | None = field(default=None, init=False)

    @property
    def ways_in(self) -> int:
        """2 where a neuron is driven by gates and ups, else 1."""
        return 1 if self.w_up is None else 2

    def shares(self, segments: slice) -> LinearShares:
        """Return the rule's coefficients at some of the segments, in float32 at least."""
        span, held = self.recorded.span(segments), self._held
        if held is None or not held[0].start <= span.start <= span.stop <= held[0].stop:
            self._held = held = None  # before its successor is made
            unique = self.recorded.unique
            at = slice(span.start, max(span.stop, min(span.start + self.most, len(unique))))
            dtype = torch.promote_types(self.w_gate.dtype, torch.float32)
            up = None if self.up is None else self.up[at]
            made = linear_shares(self.rule, self.weights, self.trace, unique[at], dtype, up)
            self._held = held = (at, made)
        first, index = held[0].start, self.recorded.index
        if index is None:
            return held[1].at(slice(span.start - first, span.stop - first))
        return held[1].at(index[segments] - first)

    def written(self, shares: LinearShares, segments: slice) -> tuple[Tensor, Tensor | None]:
        """Return the coefficients (S', I) of gates and ups, times s of a norm on the output."""
        if self.out_scale is None:
            return shares.gate, shares.up
        scale = self.out_scale[segments, None].to(shares.gate)
        return shares.gate * scale, None if shares.up is None else shares.up * scale

    def constant(self, shares: LinearShares, segments: slice, dtype: torch.dtype) -> Tensor | None:
        """Return what `bias` receives by its constants at some segments: (S', D), or (D,), or None."""
        out_scale = None if self.out_scale is None else self.out_scale[segments]
        recorded = self.recorded.rows[segments]
        return shares.written_constant(self.weights, self.trace, recorded, out_scale, dtype, self.w_down)


def linear_chunk(
    state: ComponentState,
    source: ComponentState,
    chunk: Chunk,
    step: LinearStep,
    active: Tensor | None,
    neurons: list[slice],
    workspace: Workspace,
) -> None:
    """Add to ``state`` what ``source`` drives in a chunk, which may be the same state.

    ``active`` (u,) are the neurons that do anything there, None: all. ``neurons`` are blocks of them.
    """
    shares, target, dtype = step.shares(chunk.segments), state.rows[chunk.rows], step.w_gate.dtype
    constant = None
    if state.layout.index(BIAS) is not None:
        constant = step.constant(shares, chunk.segments, state.rows.dtype)
    w_gate, w_down = step.w_gate, step.w_down
    if active is not None:
        shares = LinearShares(shares.gate.index_select(1, active))
        w_gate, w_down = w_gate.index_select(0, active), w_down.T.index_select(0, active).T
    rows, scale = source.rows[chunk.rows], step.scale
    factor = None if step.out_scale is None else step.out_scale[chunk.segments].to(scale)
    if rows.dtype == dtype:
        factor = scale[chunk.segments] if factor is None else scale[chunk.segments] * factor
    else:  # the scale keeps half precision in its range
        read = workspace.take("rows", rows.shape, rows, dtype)
        if rows.dtype == scale.dtype:
            rows = torch.mul(rows, scale[chunk.segment_of, None], out=read)
        else:
            wide = workspace.take("wide rows", rows.shape, rows, scale.dtype).copy_(rows)
            rows = read.copy_(wide.mul_(scale[chunk.segment_of, None]))
    # in place with one block of neurons, else nothing is written before all has been read
    out = target if len(neurons) == 1 else workspace.take("out", target.shape, target).copy_(target)
    for part in neurons:
        driven = workspace.take("values", (len(rows), part.stop - part.start), rows)
        write_product(driven, rows, w_gate[part].T)
        ups = None
        if step.w_up is not None:
            ups = workspace.take("ups", driven.shape, driven)
            write_product(ups, rows, step.w_up[part].T)
        _weigh(driven, ups, chunk, shares, factor, part)
        accumulate(out, driven, w_down[:, part].T)
    if out is not target:
        target.copy_(out)
    if constant is not None:
        _add_to_bias(target, state.layout, chunk, constant)


def linear_block(x: Tensor, step: LinearStep, at: slice, neurons: list[slice], bias: int | None) -> Tensor:
    """Return what components ``x`` (n, b, D) at the segments ``at`` receive: (n · b, D), in their dtype.

    ``bias`` is the place of that component among them.
    """
    shares, dtype = step.shares(at), step.w_gate.dtype
    read = (x * step.scale[at, None, None]).to(dtype)
    out = x.new_zeros(x.shape)
    for part in neurons:
        driven = product(read, step.w_gate[part].T) * shares.gate[:, None, part]
        if step.w_up is not None and shares.up is not None:
            driven += product(read, step.w_up[part].T) * shares.up[:, None, part]
        if step.out_scale is not None:
            driven = driven * step.out_scale[at, None, None]
        out += product(driven.to(dtype), step.w_down[:, part].T).to(out)
    constant = None if bias is None else step.constant(shares, at, x.dtype)
    if constant is not None:
        out[:, bias] += constant
    return out.flatten(0, 1)


def _weigh(
    gates: Tensor, ups: Tensor | None, chunk: Chunk, shares: LinearShares, factor: Tensor | None, part: slice
) -> None:
    """Turn gates (r, i) into the shares of the activations that their rows drive, times ``factor`` (S',), in place."""
    for rows, segments, n in runs(chunk.counts):
        for values, coefficients in ((gates, shares.gate), (ups, shares.up)):
            if values is None or coefficients is None:
                continue
            each = coefficients[segments, part]
            if factor is not None:
                each = each * factor[segments, None]
            values[rows].view(n, -1, values.shape[1]).mul_(each[:, None])
    if ups is not None:
        gates += ups


def _add_to_bias(rows: Tensor, layout: Layout, chunk: Chunk, constant: Tensor) -> None:
    """Add ``constant`` (S', D) or (D,) to the rows of `bias` in a chunk (r, D)."""
    bias = layout.index(BIAS)
    assert bias is not None
    for at, segments, n in runs(chunk.counts):
        of_bias = rows[at].view(n, -1, rows.shape[1])[:, bias]
        of_bias += (constant if constant.ndim == 1 else constant[segments]).to(rows)
