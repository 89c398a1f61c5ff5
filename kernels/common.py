"""What the kernels share: whether they are interpreted, products, sizes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOG2E = 1.4426950408889634


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter: decided when they are first imported."""
    return bool(triton.knobs.runtime.interpret)


def widened(dtype: torch.dtype) -> bool:
    """Whether operands must be float32 before a product: the interpreter's own in bfloat16 is garbage."""
    return interpreted() and dtype == torch.bfloat16


def precision() -> str:
    """How float32 is multiplied: on NVIDIA's matrix units in three tf32 products, which is float32's own accuracy.

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
    """The smallest power of two that holds ``n``, at least ``least``: what a product's sides must be."""
    return max(least, triton.next_power_of_2(n))
