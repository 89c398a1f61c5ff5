"""The linear rules: gates and ups become shares of the frozen activation, each by its own (DESIGN.md section 8).

The coefficients are tables, one number per position and neuron. Every tile is read once.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# (Triton declares a kernel's constants as `constexpr` and gets numbers; num_warps is no parameter of a kernel)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import FLOATS, check
from .launch import allocation_config


@triton.jit
def _share_linearly(
    g, u, of_gate, of_up, starts, n_neurons, stride, up_stride, gate_table, up_table,
    HAS_UP: tl.constexpr, BM: tl.constexpr, BI: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(n_neurons, BI)
    segment = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BI + tl.arange(0, BI)
    inside = i < n_neurons
    first = tl.load(starts + segment)
    count = (tl.load(starts + segment + 1) - first).to(tl.int32)
    a = tl.load(of_gate + segment * gate_table + i, mask=inside, other=0.0)  # [BI]
    b = a
    if HAS_UP:
        b = tl.load(of_up + segment * up_table + i, mask=inside, other=0.0)
    for t in tl.range(0, count, BM, num_stages=STAGES):
        m = t + tl.arange(0, BM)
        row, there = (first + m)[:, None], (m < count)[:, None] & inside[None, :]
        shares = tl.load(g + row * stride + i[None, :], mask=there, other=0.0).to(tl.float32) * a[None, :]  # [BM, BI]
        if HAS_UP:
            ups = tl.load(u + row * up_stride + i[None, :], mask=there, other=0.0)
            shares += ups.to(tl.float32) * b[None, :]
        tl.store(g + row * stride + i[None, :], shares.to(g.dtype.element_ty), mask=there)


def share_linearly(
    g: Tensor, starts: Tensor, longest: int, gate: Tensor, u: Tensor | None = None, up: Tensor | None = None
) -> None:
    """Replace gates by shares of the frozen activation, in place: g (r, i) <- ``gate`` · g + ``up`` · u.

    ``gate`` and ``up`` (S, i) float32 are the rule's coefficients at the segments, which begin at the rows ``starts``
    (S + 1,) int64 and have up to ``longest`` of them. ``u`` (r, i) are the ups, where the rule looks at them. Rows may
    be parts of longer ones.

    Raises:
        ValueError: a tensor of another shape, dtype or memory layout, or one of ``u`` and ``up`` alone.
    """
    check("g", g, (None, None), *FLOATS, spaced=True)
    n_rows, n_neurons = g.shape
    check("starts", starts, (None,), torch.int64)
    check("gate", gate, (len(starts) - 1, n_neurons), torch.float32, spaced=True)
    if (u is None) != (up is None):
        raise ValueError("u, up: ups need coefficients, and coefficients ups; one of the two is missing.")
    if u is not None and up is not None:
        check("u", u, (n_rows, n_neurons), g.dtype, spaced=True)
        check("up", up, gate.shape, torch.float32, spaced=True)
    if not g.numel():
        return
    config = allocation_config(longest, n_neurons, g.dtype, g.device)
    del config["ONE_TILE"]
    ups, coefficients = g if u is None else u, gate if up is None else up
    _share_linearly[((len(starts) - 1) * triton.cdiv(n_neurons, config["BI"]),)](
        g,
        ups,
        gate,
        coefficients,
        starts,
        n_neurons,
        g.stride(0),
        ups.stride(0),
        gate.stride(0),
        coefficients.stride(0),
        HAS_UP=u is not None,
        **config,
    )
