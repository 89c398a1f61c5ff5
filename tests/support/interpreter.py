"""Triton's interpreter, made to round as a GPU does."""

from __future__ import annotations

import numpy as np


def round_as_a_gpu_does() -> None:
    """Make the interpreter round to bfloat16: it truncates, which is twice the error of rounding, all to one side."""
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    usual = interpreter._convert_float

    def converted(values, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return usual(values, source, target, mode)
        bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to even
        return nearest.astype(np.uint16).reshape(values.shape)

    interpreter._convert_float = converted
