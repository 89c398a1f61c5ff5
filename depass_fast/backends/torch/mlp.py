"""The MLP's allocation for the torch backend, a chunk of positions at a time: the softmax, and every other case."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from ...allocation import Allocation, Edit, Gates, inverse
from ...labels import BIAS, REST
from ...runtime.products import accumulate, product, write_product
from ...runtime.transfer import to_device
from ...state.layout import Layout
from ...state.state import ComponentState, segment_sums
from .blocks import Chunk
from .workspace import Workspace

# exp(-80) is below the rounding of any dtype; what lies below it would only make denormals, which CPUs are slow at
_FLOOR = -80.0
_LEAST_SHARE = 1.01 * math.exp(_FLOOR)
_LARGEST_FACTOR = 1e12  # of gates by the product itself: beyond it they could overflow


@dataclass(frozen=True)
class MlpStep:
    """One layer's MLP at the state's segments: scale (S,), w_gate (I, D) with γ, w_down (D, I), act and gate (S, I).

    ``active`` (u,) are the neurons that the weights are of; ``act`` and ``gate`` keep all. None: they are of all.
    """

    scale: Tensor
    w_gate: Tensor
    w_down: Tensor
    gate_constant: Tensor | None
    act: Tensor
    gate: Tensor
    allocation: Allocation
    active: Tensor | None = None

    def only(self, neurons: Tensor, workspace: Workspace) -> MlpStep:
        """The same with some of the neurons (u,) alone, whose weights are in the workspace."""
        w_gate, w_down = (
            torch.index_select(w, 0, neurons, out=workspace.take(name, (len(neurons), w.shape[1]), w))
            for name, w in (("active gate", self.w_gate), ("active down", self.w_down.T))
        )
        constant = None if self.gate_constant is None else self.gate_constant[neurons]
        return replace(self, w_gate=w_gate, w_down=w_down.T, gate_constant=constant, active=neurons)

    def frozen(self, values: Tensor, segments: slice, part: slice) -> Tensor:
        """``act`` or ``gate`` of some segments and some of the neurons that the weights are of: (n, i)."""
        return values[segments, part] if self.active is None else values[segments].index_select(1, self.active[part])


@dataclass(frozen=True)
class _Read:
    """A chunk's rows x (r, D) as the products read them: ``factor`` · x W_gate are the gates times ``before``.

    ``before`` · ``after`` is 1 / T. In half precision g / T could overflow, as with a tiny T anywhere: there T is
    applied after the largest gate has been subtracted. ``bias_rows`` receive the gates' constant, None if there is
    none. ``dead`` rows are zero; ``dead_bias`` are those of `bias`, where it has a constant. None stands for no rows.
    """

    x: Tensor
    factor: float
    before: float
    after: float
    bias_rows: Tensor | None
    dead: Tensor | None
    dead_bias: Tensor | None


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
    dtype, per_t = step.act.dtype, inverse(step.allocation.temperature, _wide(step.act.dtype))
    before, after = (per_t, 1.0) if dtype == _wide(dtype) and per_t < _LARGEST_FACTOR else (1.0, per_t)
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
    dead, dead_bias = _zero_rows(rows), None
    if dead is not None and bias_rows is not None:
        of_bias = torch.isin(dead, bias_rows)
        dead, dead_bias = dead[~of_bias], dead[of_bias]
    return _Read(x, factor, before, after, bias_rows, dead, dead_bias)


def _zero_rows(rows: Tensor) -> Tensor | None:
    """Return which rows (r, D) are exactly zero, or None if none is. Few need a look at more than one column."""
    if not has_zeros(rows[:, 0]):
        return None
    dead = (torch.linalg.vector_norm(rows, torch.inf, dim=1) == 0).nonzero()[:, 0]
    return dead if len(dead) else None


def _shares(
    read: _Read, layout: Layout, chunk: Chunk, step: MlpStep, part: slice, workspace: Workspace
) -> Tensor | None:
    """The activations of some neurons as the rows share them: (r, i), or None if a neuron finds nobody eligible."""
    x, wide = read.x, _wide(read.x.dtype)
    product = workspace.take("values", (len(x), part.stop - part.start), x)
    write_product(product, x, step.w_gate[part].T, read.factor)
    gates = product
    if product.dtype != wide:  # in half precision shares would not sum to one
        gates = workspace.take("gates", product.shape, product, wide).copy_(product)
    constant = None if read.bias_rows is None or step.gate_constant is None else step.gate_constant[part]
    if constant is not None:
        gates[read.bias_rows] += constant.to(wide) * read.before
    absent = _Absent(read.dead, read.dead_bias, chunk.away, constant)
    absent.shut_dead(gates)
    edit = step.allocation.edit
    shut = edit is not None and (_edited(edit, gates, chunk, layout, read.before) or absent.anyone_dead)
    absent.shut_away(gates)
    act = step.frozen(step.act, chunk.segments, part)
    if not _softmax_segments(gates, chunk, act, workspace, read.after, absent, shut):
        return None
    return gates if gates is product else product.copy_(gates)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the softmax: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def _edited(edit: Edit, g: Tensor, chunk: Chunk, layout: Layout, factor: float) -> bool:
    """Apply ``edit`` to the gates (r, i) of a chunk, ``factor`` times themselves. True if it shut anyone out."""
    local = to_device(layout.local[chunk.segments], g.device)
    parts = runs(chunk.counts)
    return any([edit(g[rows].view(n, -1, g.shape[1]), local[segments], factor) for rows, segments, n in parts])


@dataclass(frozen=True)
class _Absent:
    """The rows that take no part in some neurons' softmax: ``dead`` ones, ``away`` from home; None for no rows.

    ``dead_bias`` rows take part in neurons whose ``constant`` (i,) is not zero.
    """

    dead: Tensor | None
    dead_bias: Tensor | None
    away: Tensor | None
    constant: Tensor | None

    @property
    def anyone_dead(self) -> bool:
        return self.dead is not None or self.dead_bias is not None

    def shut_dead(self, g: Tensor, to: float = -torch.inf) -> None:
        """Set the dead rows of ``g`` (r, i) ``to`` a number."""
        if self.dead is not None:
            g[self.dead] = to
        if self.dead_bias is not None and self.constant is not None:
            g[self.dead_bias] = g[self.dead_bias].masked_fill_(self.constant == 0, to)

    def shut_away(self, g: Tensor, to: float = -torch.inf) -> None:
        """Set the rows away from home ``to`` a number."""
        if self.away is not None:
            g[self.away] = to


def _softmax_segments(
    g: Tensor, chunk: Chunk, act: Tensor, workspace: Workspace, per_t: float, absent: _Absent, shut: bool
) -> bool:
    """Turn gates (r, i) into the softmax of ``per_t`` · g over each segment's rows times the activation ``act`` (S, i).

    Gates of those who are ``absent`` are -inf; ``shut``: an edit may have changed who is. Returns False if that leaves
    nobody.
    """
    sums = workspace.take("sums", (len(chunk.counts), g.shape[1]), g)
    parts = [(g[rows].view(n, -1, g.shape[1]), segments) for rows, segments, n in runs(chunk.counts)]
    for part, segments in parts:
        part -= torch.amax(part, 1, keepdim=True, out=sums[segments, None])
    if (absent.anyone_dead or shut) and (sums == -torch.inf).any():
        return False
    if per_t != 1.0:
        g.mul_(per_t)
    g.clamp_min_(_FLOOR).exp_()
    if shut:
        g.masked_fill_(g <= _LEAST_SHARE, 0.0)  # the floor of the exponent is no share
    else:
        absent.shut_dead(g, 0.0)
        absent.shut_away(g, 0.0)
    if len(parts) == 1:
        torch.sum(parts[0][0], 1, out=sums)
    else:
        sums = segment_sums(g, to_device(np.cumsum(chunk.counts) - chunk.counts, g.device))
    sums = torch.div(act, sums, out=sums)
    for part, segments in parts:
        part *= sums[segments, None]
    return True


def has_zeros(x: Tensor) -> bool:
    """True if any element is exactly zero."""
    if x.device.type == "cpu":
        return int(torch.count_nonzero(x)) < x.numel()
    return bool((x == 0).any())  # a GPU counts in a copy of 8 bytes per element


def runs(counts: list[int]) -> Iterator[tuple[slice, slice, int]]:
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
            g = product(x, step.w_gate[part].T).to(torch.promote_types(dtype, torch.float32))  # (n, M, i)
            if step.gate_constant is not None:
                g[:, layout.index(BIAS)] += step.gate_constant[part]
            gates = Gates(
                values=g,
                total=step.frozen(step.gate, at, part).to(g.dtype),
                alive=alive,
                excluded=excluded & (births != local[:, None]),
                positions=local,
                rest=layout.index(REST),
                bias=layout.index(BIAS),
                constant=None if step.gate_constant is None else step.gate_constant[part],
            )
            shares = step.allocation.weights(gates) * step.frozen(step.act, at, part)[:, None]
            out += product(shares.to(dtype), step.w_down[:, part].T)
    state.rows[chunk.rows].add_(gained)  # += would copy it onto itself afterwards, and could fail there
