"""The largest gate of components that may drive a neuron alone (docs/adjoint.md, 4), in one reading of the gates."""

# pyright: reportArgumentType=false, reportCallIssue=false
# (Triton declares a kernel's constants as `constexpr` and gets numbers; num_warps is no parameter of a kernel)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, float32

from .common import FLOATS, check
from .launch import sum_config


@triton.jit(do_not_specialize=["n_positions", "amount_stride"])
def _loudest(
    gates, amounts, scale, out, n_positions, n_neurons, amount_stride,
    STAGES: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i, m = tl.arange(0, BD), tl.arange(0, BM)
    largest = tl.zeros((BD,), tl.float32)
    for first in tl.range(0, n_neurons, BD, num_stages=STAGES):
        g = tl.load(gates + row * n_neurons + first + i, mask=first + i < n_neurons, other=0.0)
        largest = tl.maximum(largest, tl.abs(g.to(tl.float32)))
    most = tl.zeros((BM,), tl.float32)
    for first in range(0, n_positions, BM):
        n = first + m
        here = n < n_positions
        amount = tl.load(amounts + n.to(tl.int64) * amount_stride + row, mask=here, other=0.0)
        most = tl.maximum(most, amount * tl.load(scale + n, mask=here, other=0.0))
    tl.store(out + row, tl.max(largest, 0) * tl.max(most, 0))


def loudest(gates: Tensor, amounts: Tensor, scale: Tensor, out: Tensor) -> None:
    """max_i |gates[r, i]| · max_n amounts[n, r] · scale[n] of every row: (R, I), (N, R), (N,) -> ``out`` (R,).

    All but the gates are float32; amounts and scales are not negative. Gates that are NaN are left out.

    Raises:
        ValueError: a tensor of another shape, dtype or memory layout.
    """
    check("gates", gates, (None, None), *FLOATS)
    n_rows, n_neurons = gates.shape
    check("amounts", amounts, (None, n_rows), float32, spaced=True)
    check("scale", scale, (len(amounts),), float32)
    check("out", out, (n_rows,), float32)
    config = sum_config(n_neurons)
    _loudest[(n_rows,)](gates, amounts, scale, out, len(amounts), n_neurons, amounts.stride(0), **config)
