"""Products of matrices: added to what is there, and on a CPU by the faster of torch's two libraries.

torch multiplies float32 matrices on a CPU by MKL, and MKL takes AVX2 where the CPU is not Intel's, whatever else it
has. oneDNN, which torch carries for other things, takes AVX-512 there, at twice the rate
(``python -m bench.speed.products``).
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_WIDENED = 512  # columns of a product's operands that are widened at a time
_SMALLEST = 1 << 20  # multiplications; MKL's call is cheaper than oneDNN's
_MADE = 1 << 18  # numbers of a product by oneDNN that are made before they are written where they belong
_STEP = 64  # rows; fewer are MKL's, as fast
_ROWS = 256  # so many at least, however wide: every piece reads the whole weight
_COPIED = 1 << 20  # numbers of a weight that are copied at a time: oneDNN takes whole matrices alone
_WORTH_A_COPY = 256  # rows


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return a (..., K) @ b (K, N)."""
    if not _for_one_dnn(a, b):
        return a @ b
    if _is_whole(b):
        return _by_one_dnn(a, b.T)
    out = a.new_empty(*a.shape[:-1], b.shape[1])
    for at, made in _pieces(a.reshape(-1, a.shape[-1]), b):
        out.view(-1, b.shape[1])[at] = made
    return out


def write_product(out: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> None:
    """out (r, N) = alpha · a (r, K) @ b (K, N), all of one dtype."""
    if not _for_one_dnn(a, b, out):
        torch.addmm(out, a, b, beta=0.0, alpha=alpha, out=out)
        return
    for at, made in _pieces(a, b):
        out[at] = made if alpha == 1 else made.mul_(alpha)


def accumulate(out: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> None:
    """out += alpha · a (r, K) @ b (K, N), where ``out`` may be of a wider dtype."""
    if out.dtype == a.dtype:
        _add_product(out, a, b, alpha)
    elif out.is_cuda and out.dtype == torch.float32 and not torch.version.hip:  # added up in float32 by the product
        torch.addmm(out, a, b, out_dtype=torch.float32, alpha=alpha, out=out)
    elif out.is_cuda or a.dtype == torch.float16:  # whose range is short; on HIP a product's output is as wide as it
        for first in range(0, len(b), _WIDENED):
            part = slice(first, first + _WIDENED)
            _add_product(out, a[:, part].to(out.dtype), b[part].to(out.dtype), alpha)
    else:
        out.add_(a @ b, alpha=alpha)


def accumulate_block(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out (n, r, C) += a @ b, where ``out`` may be a view of another tensor and of a wider dtype: a is (n·r, K)."""
    a, n = a.view(*out.shape[:2], -1), len(out)
    if n > 1 and out.dtype == a.dtype:
        out.baddbmm_(a, b.expand(n, -1, -1))
    elif n > 1 and out.is_cuda and out.dtype == torch.float32 and not torch.version.hip:
        torch.baddbmm(out, a, b.expand(n, -1, -1), out_dtype=torch.float32, out=out)
    else:
        for one, rows in zip(out, a, strict=True):
            accumulate(one, rows, b)


def _add_product(out: Tensor, a: Tensor, b: Tensor, alpha: float) -> None:
    if not _for_one_dnn(a, b, out):
        if out.shape == (len(a), b.shape[-1]):  # a counter of FLOPs does not know addmm_
            torch.addmm(out, a, b, alpha=alpha, out=out)
        else:  # addmm would give `out` another shape
            out.addmm_(a, b, alpha=alpha)
        return
    for at, made in _pieces(a, b):
        out[at].add_(made, alpha=alpha)


def _pieces(a: Tensor, b: Tensor) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
    """Yield a (r, K) @ b (K, N) in pieces, and where each of them is: what is made and copied at a time is small."""
    width = b.shape[1] if _is_whole(b) else max(1, _COPIED // b.shape[0])
    height = max(_ROWS, _MADE // min(width, b.shape[1]))
    for left in range(0, b.shape[1], width):
        columns = slice(left, left + width)
        weight = b.T if _is_whole(b) else b.T[columns].contiguous()
        for rows in _heights(len(a), height):
            part = a[rows]
            yield (rows, columns), part @ weight.T if len(part) < _STEP else _by_one_dnn(part, weight)


def _heights(n: int, height: int) -> Iterator[slice]:
    """Cut ``n`` rows into pieces of ``height``, one of a multiple of ``_STEP``, and what is left, which MKL takes.

    oneDNN compiles a kernel for every shape, which takes as long as four products, and keeps a thousand of them: with
    any number of rows there would be a kernel, 0.2 MB, for each.
    """
    whole = n // height * height
    step = whole + (n - whole) // _STEP * _STEP
    yield from (slice(top, top + height) for top in range(0, whole, height))
    yield from (slice(first, last) for first, last in ((whole, step), (step, n)) if last > first)


def _by_one_dnn(a: Tensor, weight: Tensor) -> Tensor:
    """Return a (..., K) @ weight (N, K).T."""
    return torch.ops.mkldnn._linear_pointwise(a, weight, None, "none", [], "")


def _for_one_dnn(a: Tensor, b: Tensor, out: Tensor | None = None) -> bool:
    """Return if a @ b, written to ``out`` or anew, is a product for oneDNN; what is no product at all is torch's."""
    if not (a.device.type == "cpu" and a.dtype == b.dtype == torch.float32 and one_dnn_is_faster()):
        return False
    if b.dim() != 2 or a.shape[-1:] != b.shape[:1] or (out is not None and out.shape != (len(a), b.shape[1])):
        return False
    if is_in_torch_dispatch_mode() or (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)):
        return False  # counters of FLOPs know torch's own products, and so do gradients
    large = a.numel() * b.shape[1] >= _SMALLEST
    return large and (_is_whole(b) or a.numel() >= _WORTH_A_COPY * a.shape[-1])


def _is_whole(b: Tensor) -> bool:
    return b.is_contiguous() or b.T.is_contiguous()


@functools.cache
def one_dnn_is_faster() -> bool:
    """Return if oneDNN multiplies float32 matrices faster than what torch takes: an AVX-512 CPU that is not Intel's.

    The answer does not come from a clock, so that a second run gives the same numbers.
    """
    libraries = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return libraries and torch.backends.cpu.get_cpu_capability() == "AVX512" and "GenuineIntel" not in _vendor()


def _vendor() -> str:
    """Return what the system says of the CPU's vendor."""
    cpus = Path("/proc/cpuinfo")
    return cpus.read_text(encoding="utf-8", errors="replace") if cpus.exists() else platform.processor()
