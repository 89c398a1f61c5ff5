"""Products of float32 numbers as three products in float16, for the tensor cores of a GPU.

A row is its largest power of two, ``size``, times numbers of up to 2^15, and each of these is the sum of two float16:
``high`` has the first 11 bits, ``low`` the next 11. float16 ends at 2^-24, so that a number is off by its 2^-23 or by
the row's 2^-39, whichever is more. Of the product x wᵀ the part low · low is left out:

    x wᵀ = size_x · size_w · 2^-28 · (high · low + low · high + high · high)

added up in float32, the small parts first. A single product of two numbers is off by 2^-21 (4.8e-7) at most: 2^-23 for
each number and 2^-22 for what is left out. Sums of many are off by less than 3e-7, in units of the norms of the row and
of the weight's row. How a GPU adds up within one product is not in that: tensor cores may cut off bits that float32
rounds.

Measured on an H100 (``python -m bench.speed.gpu --only float32``), 11,009 rows, K = 4096, 11,008 columns: 177 TFLOP/s,
the splitting of the rows included, against 51 of cuBLAS; and an error of 4.9e-6 against 1.2e-6, relative to the norm.
The library does not use it: who computes in float32 is promised float32's rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_TOP = 14  # the power of two that a row's largest number is brought to


class Split(NamedTuple):
    """A matrix (r, K) in float32 as ``size`` (r,) · 2^-14 · (``high`` + ``low``), these (r, K) in float16."""

    high: Tensor
    low: Tensor
    size: Tensor

    def rows(self, part: slice) -> Split:
        """Some of the rows, as views: neurons of a gate's weight."""
        return Split(self.high[part], self.low[part], self.size[part])

    def columns(self, part: slice) -> Split:
        """Some of the columns, as views: neurons of a down projection's weight."""
        return Split(self.high[:, part], self.low[:, part], self.size)


def split(x: Tensor) -> Split:
    """Split a matrix (r, K) in float32, row by row. A row with NaN or inf holds NaN afterwards."""
    # the exponent's bits alone: a power of two, exact where `pow` might not be. Rows of less than 2^-112 keep to that
    exponent = (torch.linalg.vector_norm(x, torch.inf, dim=1).view(torch.int32) >> 23).clamp_(_TOP + 1, 254)
    scaled = x * ((254 + _TOP - exponent) << 23).view(torch.float32)[:, None]
    high = scaled.half()
    return Split(high, scaled.sub_(high).half(), (exponent << 23).view(torch.float32))


def split_product(x: Split, w: Split, out: Tensor | None = None) -> Tensor:
    """Return x wᵀ (r, C) in float32 of x (r, K) and w (C, K), in ``out`` if given."""
    out = torch.empty(len(x.high), len(w.high), device=x.high.device) if out is None else out
    parts = ((x.high, w.low), (x.low, w.high), (x.high, w.high))
    for i, (a, b) in enumerate(parts):
        _add(out, a, b, float(i > 0))
    return out.mul_(x.size[:, None]).mul_(w.size)


def _add(out: Tensor, a: Tensor, b: Tensor, beta: float) -> None:
    """out = beta · out + 2^-28 · a bᵀ, with a and b in float16 and all sums in float32."""
    alpha = 2.0 ** (-2 * _TOP)
    if out.is_cuda and not torch.version.hip:
        torch.addmm(out, a, b.T, beta=beta, alpha=alpha, out_dtype=torch.float32, out=out)
    else:
        out.addmm_(a.float(), b.float().T, beta=beta, alpha=alpha)
