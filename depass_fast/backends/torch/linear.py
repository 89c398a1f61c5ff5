"""The linear rules for the torch backend: a chunk of positions at a time, with no component looking at another one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...adapters import Mlp
from ...labels import BIAS
from ...linear_rules import LinearShares, linear_shares
from ...state.layout import Layout
from ...state.state import ComponentState
from ...trace.record import MlpTrace
from .blocks import Chunk
from .mlp import accumulate, runs
from .workspace import Workspace


@dataclass(frozen=True)
class LinearStep:
    """One layer's MLP under a linear ``rule``: scale (S,), w_gate and w_up (I, D) with γ, w_down (D, I) as it writes.

    ``recorded`` (S,) are the rows of the trace that segments read, ``up`` (S, I) the frozen up projection. It and
    ``w_up`` are None where the rule does not look at it. ``out_scale`` (S,) is s of a norm on the output, if any.
    """

    rule: str
    weights: Mlp
    trace: MlpTrace
    scale: Tensor
    w_gate: Tensor
    w_up: Tensor | None
    w_down: Tensor
    recorded: Tensor
    up: Tensor | None
    out_scale: Tensor | None

    def shares(self, segments: slice) -> LinearShares:
        """Return the rule's coefficients at some of the segments, in float32 at least."""
        dtype = torch.promote_types(self.w_gate.dtype, torch.float32)
        up = None if self.up is None else self.up[segments]
        return linear_shares(self.rule, self.weights, self.trace, self.recorded[segments], dtype, up)

    def constant(self, shares: LinearShares, segments: slice, dtype: torch.dtype) -> Tensor | None:
        """Return what `bias` receives by its constants at some segments: (S', D), or (D,), or None."""
        out_scale = None if self.out_scale is None else self.out_scale[segments]
        return shares.written_constant(self.weights, self.trace, self.recorded[segments], out_scale, dtype)


def linear_chunk(
    state: ComponentState,
    source: ComponentState,
    chunk: Chunk,
    step: LinearStep,
    neurons: list[slice],
    workspace: Workspace,
) -> None:
    """Add to ``state`` what ``source`` drives in a chunk, which may be the same state."""
    shares, target, dtype = step.shares(chunk.segments), state.rows[chunk.rows], step.w_gate.dtype
    constant = None
    if state.layout.index(BIAS) is not None:
        constant = step.constant(shares, chunk.segments, state.rows.dtype)
    rows, scale = source.rows[chunk.rows], step.scale
    factor = None if step.out_scale is None else step.out_scale[chunk.segments].to(scale)
    if rows.dtype == dtype:
        factor = scale[chunk.segments] if factor is None else scale[chunk.segments] * factor
    else:  # the scale keeps half precision in its range
        wide = workspace.take("wide rows", rows.shape, rows, scale.dtype).copy_(rows)
        rows = workspace.take("rows", rows.shape, rows, dtype).copy_(wide.mul_(scale[chunk.segment_of, None]))
    # in place with one block of neurons, else nothing is written before all has been read
    out = target if len(neurons) == 1 else workspace.take("out", target.shape, target).copy_(target)
    for part in neurons:
        driven = workspace.take("values", (len(rows), part.stop - part.start), rows)
        torch.mm(rows, step.w_gate[part].T, out=driven)
        ups = None
        if step.w_up is not None:
            ups = workspace.take("ups", driven.shape, driven)
            torch.mm(rows, step.w_up[part].T, out=ups)
        _weigh(driven, ups, chunk, shares, factor, part)
        accumulate(out, driven, step.w_down[:, part].T)
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
        driven = (read @ step.w_gate[part].T) * shares.gate[:, None, part]
        if step.w_up is not None and shares.up is not None:
            driven += (read @ step.w_up[part].T) * shares.up[:, None, part]
        if step.out_scale is not None:
            driven = driven * step.out_scale[at, None, None]
        out += (driven.to(dtype) @ step.w_down[:, part].T).to(out)
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
