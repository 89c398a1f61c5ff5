"""The common parts of the kernels: interpretation, products, sizes, and the check of arguments."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

LOG2E = 1.4426950408889634
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def current(device: torch.device) -> AbstractContextManager:
    """Make ``device`` the current one: Triton launches there."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def interpreted() -> bool:
    """True if kernels run in Triton's interpreter. That is decided when they are first imported."""
    return bool(knobs.runtime.interpret)


def widened(dtype: torch.dtype) -> bool:
    """True if operands must be float32 before a product: the interpreter's bfloat16 products are wrong."""
    return interpreted() and dtype == torch.bfloat16


def wider(a: torch.dtype, b: torch.dtype) -> torch.dtype:
    """The one of two dtypes that has more bytes, the first of equals: bfloat16 and float16 are both half precision."""
    return b if b.itemsize > a.itemsize else a


def precision() -> str:
    """The precision of float32 products: on NVIDIA three tf32 products, which are as accurate as float32.

    Triton's default, one tf32 product, is off by 3e-4.
    """
    return "ieee" if torch.version.hip or interpreted() else "tf32x3"


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr, WIDE: tl.constexpr):
    """acc + a @ b, accumulated in float32."""
    if WIDE:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that holds ``n`` and is at least ``least``, as a product's sides must be."""
    return max(least, 1 << (n - 1).bit_length())


def check(name: str, x: Tensor, shape: tuple[int | None, ...], *dtypes: torch.dtype, spaced: bool = False) -> None:
    """Refuse a tensor that a kernel, which sees addresses only, would read wrongly. The device is not asked.

    ``shape`` holds None for any length. Elements lie side by side; with ``spaced`` only those of a row must.

    Raises:
        ValueError: another shape, dtype or memory layout; names the argument.
    """
    fits = len(x.shape) == len(shape) and all(n is None or n == m for n, m in zip(shape, x.shape, strict=True))
    dense = x.stride(-1) == 1 or x.shape[-1] == 1 if spaced and x.ndim else x.is_contiguous()
    if fits and dense and x.dtype in dtypes:
        return
    kinds = " or ".join(str(one).removeprefix("torch.") for one in dtypes)
    sizes = ", ".join("any" if n is None else str(n) for n in shape)
    raise ValueError(
        f"{name}: expected {kinds} of shape ({sizes}), contiguous{' in its rows' if spaced else ''}; got "
        f"{str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}, strides {x.stride()}."
    )
