"""The MLP's allocation for the torch backend, a chunk of positions at a time: the softmax, and every other case."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from ...allocation import Allocation, Edit, Gates
from ...labels import BIAS, REST
from ...runtime.transfer import to_device
from ...state.layout import Layout
from ...state.state import ComponentState, segment_sums
from .blocks import Chunk
from .workspace import Workspace

# exp(-80) is below the rounding of any dtype; what lies below it would only make denormals, which CPUs are slow at
_FLOOR = -80.0
_LEAST_SHARE = 1.01 * math.exp(_FLOOR)


@dataclass(frozen=True)
class MlpStep:
    """One layer's MLP at the state's segments: scale (S,), w_gate (I, D) with γ, w_down (D, I), act and gate (S, I)."""

    scale: Tensor
    w_gate: Tensor
    w_down: Tensor
    gate_constant: Tensor | None
    act: Tensor
    gate: Tensor
    allocation: Allocation
    sparse: bool  # w_gate holds exact zeros


@dataclass(frozen=True)
class _Read:
    """A chunk's rows x (r, D) as the products read them: ``factor`` · x W_gate are the gates times ``before``.

    ``before`` · ``after`` is 1 / T. In half precision g / T could overflow: there T is applied to the float32 gates,
    after the product. ``bias_rows`` receive the gates' constant, None if there is none. ``may_vanish`` says that a gate
    may be exactly zero.
    """

    x: Tensor
    factor: float
    before: float
    after: float
    bias_rows: Tensor | None
    may_vanish: bool


def softmax_chunk(
    state: ComponentState,
    source: ComponentState,
    chunk: Chunk,
    step: MlpStep,
    neurons: list[slice],
    workspace: Workspace,
) -> bool:
    """Do the common case in place: ``state`` receives what ``source`` drives, which may be the same.

    Returns False, with the state untouched, if a neuron finds nobody eligible.
    """
    if chunk.deserted:
        return False
    target = state.rows[chunk.rows]
    # in place with one block of neurons, else nothing is written before it is known that the chunk is an ordinary one
    out = target if len(neurons) == 1 else workspace.take("out", target.shape, target).copy_(target)
    read = _read(source.rows[chunk.rows], state.layout, chunk, step, workspace)
    for part in neurons:
        shares = _shares(read, state.layout, chunk, step, part, workspace)
        if shares is None:
            return False
        accumulate(out, shares, step.w_down[:, part].T)
    if out is not target:
        target.copy_(out)
    return True


def _read(rows: Tensor, layout: Layout, chunk: Chunk, step: MlpStep, workspace: Workspace) -> _Read:
    """Read a chunk's rows (r, D), scaled by the frozen norm, in the products' dtype."""
    dtype, inverse = step.act.dtype, 1.0 / step.allocation.temperature
    before, after = (inverse, 1.0) if dtype == _wide(dtype) else (1.0, inverse)
    if len(chunk.counts) == 1 and rows.dtype == dtype and not rows.is_cuda:  # the scale is the product's own factor
        x, factor = rows, (before * step.scale[chunk.segments]).item()
    else:
        scale, factor = (step.scale * before)[chunk.segment_of, None], 1.0
        x = workspace.take("rows", rows.shape, rows, dtype)
        if rows.dtype == scale.dtype:
            torch.mul(rows, scale, out=x)
        else:  # a product of two dtypes makes temporaries of every size, which fragment a CPU's memory
            x.copy_(workspace.take("wide rows", rows.shape, rows, scale.dtype).copy_(rows).mul_(scale))
    bias, bias_rows = layout.index(BIAS), None
    if bias is not None and step.gate_constant is not None:
        bias_rows = to_device(np.cumsum(chunk.counts) - chunk.counts + bias, x.device)
    # an exactly zero gate comes of a zero row, or of zeros in the weights too; looking at all gates costs 5 %
    return _Read(x, factor, before, after, bias_rows, may_vanish=step.sparse or has_zeros(x[:, 0]))


def _shares(
    read: _Read, layout: Layout, chunk: Chunk, step: MlpStep, part: slice, workspace: Workspace
) -> Tensor | None:
    """The activations of some neurons as the rows share them: (r, i), or None if a neuron finds nobody eligible."""
    x, wide = read.x, _wide(read.x.dtype)
    product = workspace.take("values", (len(x), part.stop - part.start), x)
    torch.addmm(product, x, step.w_gate[part].T, beta=0.0, alpha=read.factor, out=product)
    if read.bias_rows is not None and step.gate_constant is not None:
        product[read.bias_rows] += step.gate_constant[part] * read.before
    gates = product
    if product.dtype != wide:  # in half precision shares would not sum to one
        gates = workspace.take("gates", product.shape, product, wide).copy_(product).mul_(read.after)
    edit = step.allocation.edit
    shut = edit is not None and _edited(edit, gates, chunk, layout, 1.0 / step.allocation.temperature)
    if not _softmax_segments(gates, chunk, step.act[chunk.segments, part], workspace, read.may_vanish, shut):
        return None
    return gates if gates is product else product.copy_(gates)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the softmax: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def accumulate(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b, where ``out`` may be of a wider dtype."""
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    elif (
        out.is_cuda and out.dtype == torch.float32 and not torch.version.hip
    ):  # added up in float32 by the product itself
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        out.add_(a @ b)


def _edited(edit: Edit, g: Tensor, chunk: Chunk, layout: Layout, factor: float) -> bool:
    """Apply ``edit`` to the gates (r, i) of a chunk, ``factor`` times themselves. True if it shut anyone out."""
    local = to_device(layout.local[chunk.segments], g.device)
    parts = _runs(chunk.counts)
    return any([edit(g[rows].view(n, -1, g.shape[1]), local[segments], factor) for rows, segments, n in parts])


def _softmax_segments(g: Tensor, chunk: Chunk, act: Tensor, workspace: Workspace, may_vanish: bool, shut: bool) -> bool:
    """Turn g (r, i), in units of T, into the softmax over each segment's rows times the activation ``act`` (S, i).

    A gate of exactly zero takes no part, nor do special tokens away from home, nor a row that is ``shut`` out with
    -inf. Returns False if that leaves nobody.
    """
    zeros = may_vanish and has_zeros(g)
    if zeros:
        g.masked_fill_(g == 0, -torch.inf)
    if chunk.away is not None:
        g[chunk.away] = -torch.inf
    sums = workspace.take("sums", (len(chunk.counts), g.shape[1]), g)
    parts = [(g[rows].view(n, -1, g.shape[1]), segments) for rows, segments, n in _runs(chunk.counts)]
    for part, segments in parts:
        part -= torch.amax(part, 1, keepdim=True, out=sums[segments, None])
    if (zeros or shut) and (sums == -torch.inf).any():
        return False
    g.clamp_min_(_FLOOR).exp_()
    if zeros or shut or chunk.away is not None:
        _clear(g, zeros or shut, chunk.away)
    if len(parts) == 1:
        torch.sum(parts[0][0], 1, out=sums)
    else:
        sums = segment_sums(g, to_device(np.cumsum(chunk.counts) - chunk.counts, g.device))
    sums = torch.div(act, sums, out=sums)
    for part, segments in parts:
        part *= sums[segments, None]
    return True


def _clear(shares: Tensor, zeros: bool, away: Tensor | None) -> None:
    """Set the shares of rows that take no part to exactly zero: the floor of the exponent is no share."""
    if zeros:
        shares.masked_fill_(shares <= _LEAST_SHARE, 0.0)
    elif away is not None:
        shares[away] = 0.0


def has_zeros(x: Tensor) -> bool:
    """True if any element is exactly zero."""
    if x.device.type == "cpu":
        return int(torch.count_nonzero(x)) < x.numel()
    return bool((x == 0).any())  # a GPU counts in a copy of 8 bytes per element


def _runs(counts: list[int]) -> Iterator[tuple[slice, slice, int]]:
    """Runs of neighbouring segments of equal length: their rows, the segments, and their number."""
    row = segment = 0
    for count, run in groupby(counts):
        n = len(list(run))
        yield slice(row, row + n * count), slice(segment, segment + n), n
        row, segment = row + n * count, segment + n


def general_chunk(
    state: ComponentState, source: ComponentState, chunk: Chunk, step: MlpStep, neurons: list[slice]
) -> None:
    """Do any rule and every corner with the plain rules of :mod:`depass_fast.allocation`."""
    layout, device, dtype = state.layout, state.device, step.act.dtype
    gained = torch.zeros_like(source.rows[chunk.rows])  # written to the state at last, all at once
    segments = range(chunk.segments.start, chunk.segments.stop)
    for (prompt, count), run in groupby(segments, key=lambda s: (int(layout.prompt[s]), int(layout.counts[s]))):
        run = list(run)
        at, components = slice(run[0], run[-1] + 1), layout.components[prompt]
        here = slice(int(layout.starts[at.start]), int(layout.starts[at.stop]))
        rows = source.rows[here].view(len(run), count, -1)
        local = to_device(layout.local[at], device)
        births, excluded = (to_device(a[:count], device) for a in (components.births, components.excluded))
        x = (rows * step.scale[at, None, None]).to(dtype)
        alive = (rows != 0).any(-1)
        out = gained[here.start - chunk.rows.start : here.stop - chunk.rows.start].view_as(rows)
        for part in neurons:
            g = (x @ step.w_gate[part].T).to(torch.promote_types(dtype, torch.float32))  # (n, M, i)
            if step.gate_constant is not None:
                g[:, layout.index(BIAS)] += step.gate_constant[part]
            gates = Gates(
                values=g,
                total=step.gate[at, part].to(g.dtype),
                alive=alive,
                excluded=excluded & (births != local[:, None]),
                positions=local,
                rest=layout.index(REST),
            )
            shares = step.allocation.weights(gates) * step.act[at, part][:, None]
            out += shares.to(dtype) @ step.w_down[:, part].T
    state.rows[chunk.rows].add_(gained)  # += would copy it onto itself afterwards, and could fail there
