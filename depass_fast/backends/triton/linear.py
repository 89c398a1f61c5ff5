"""The linear rules for the triton backend: a chunk of positions at a time, gates and ups in buffers of the arena."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...kernels.linear import share_linearly
from ...labels import BIAS
from ...runtime.products import accumulate
from ...state.state import ComponentState
from ..torch.linear import LinearStep
from ..torch.workspace import viewed
from .arena import Arena
from .pieces import RowChunk

Buffers = Callable[[int, int], list[Tensor]]  # of a chunk, for so many rows and neurons
Read = Callable[[Tensor], Tensor]  # reads a chunk's rows into a tensor (r, D), through the frozen norm


def linear_row_chunk(
    state: ComponentState,
    chunk: RowChunk,
    step: LinearStep,
    neurons: Tensor | None,
    arena: Arena,
    buffers: Buffers,
    read: Read,
) -> None:
    """Add to ``state`` what a chunk's rows drive, with some of the ``neurons`` (u,) alone; None: all."""
    shares, bias, dtype = step.shares(chunk.segments), state.layout.index(BIAS), step.w_gate.dtype
    constant = None if bias is None else step.constant(shares, chunk.segments, state.rows.dtype)
    of_gate, of_up = step.written(shares, chunk.segments)
    w_gate, w_down = step.w_gate, step.w_down
    if neurons is not None:
        of_gate, w_gate = of_gate.index_select(1, neurons), w_gate.index_select(0, neurons)
        w_down = w_down.T.index_select(0, neurons).T
    n, n_neurons, width = chunk.n_rows, len(w_gate), state.rows.shape[1]
    size, apart = arena.neurons(n, n_neurons, width, step.ways_in)
    one, gates, _, last, ups = buffers(n, n_neurons)
    x = read(viewed(one, dtype, n, width))
    target = state.rows[chunk.rows.first : chunk.rows.first + n]
    # several blocks are added up apart, so that the state is written to once (see budget)
    out = viewed(last, target.dtype, n, width).copy_(target) if apart else target
    for i in range(0, n_neurons, size):
        part = slice(i, min(i + size, n_neurons))
        g, u = torch.mm(x, w_gate[part].T, out=viewed(gates, dtype, n, part.stop - i)), None
        if step.w_up is not None:
            u = torch.mm(x, step.w_up[part].T, out=viewed(ups, dtype, n, part.stop - i))
        share_linearly(
            g, chunk.rows.base, chunk.longest, of_gate[:, part], u, None if of_up is None else of_up[:, part]
        )
        accumulate(out, g, w_down[:, part].T)
    if bias is not None and constant is not None:
        places = chunk.rows.base[:-1] + bias
        out.index_add_(0, places, constant.expand(len(places), -1))
    if apart:
        target.copy_(out)
