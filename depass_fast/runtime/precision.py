"""The library's products at their dtype's precision, whatever the user has allowed torch to do with products.

These settings hold for the whole process. They are the user's while the model runs its forward pass, and pinned while
states are propagated: no TF32, no sums in half precision.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_REDUCTIONS = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
_lock = threading.Lock()
_inside: list[Callable[[], None]] = []  # for every block under way, what restores the settings that it found


@contextmanager
def full_precision() -> Iterator[None]:
    """Pin the precision of products inside the block, or the function that it decorates.

    Where blocks of several threads overlap, the first pins and the last restores the user's settings.
    """
    with _lock:
        _inside.append(_inside[0] if _inside else _pin())
    try:
        yield
    finally:
        with _lock:
            restore = _inside.pop()
            if not _inside:
                restore()


def _pin() -> Callable[[], None]:
    """Pin all settings, and return a function that restores them."""
    restores = [_pin_float32(), *map(_pin_reduction, _REDUCTIONS)]
    matmul = torch.backends.cuda.matmul
    if getattr(matmul, "allow_fp16_accumulation", False):  # since torch 2.7
        matmul.allow_fp16_accumulation = False
        restores.append(lambda: setattr(matmul, "allow_fp16_accumulation", True))

    def restore() -> None:
        for one in restores:
            one()

    return restore


def _pin_float32() -> Callable[[], None]:
    """Pin float32 products. Since torch 2.9 there are two interfaces, and the old one is in error where they differ."""
    kept = []
    for backend in (torch.backends.cuda, torch.backends.mkldnn):
        matmul = getattr(backend, "matmul", None)
        found = getattr(matmul, "fp32_precision", None)
        if found is None:
            continue
        setattr(matmul, "fp32_precision", "none")  # noqa: B010 (no attribute of older versions)
        inherits = getattr(matmul, "fp32_precision", None) == found  # it is that of all operations
        setattr(matmul, "fp32_precision", "ieee")  # noqa: B010
        kept.append((matmul, "none" if inherits else found))
    old = torch.get_float32_matmul_precision()  # no error now, since what is pinned agrees with any
    if old != "highest":
        torch.set_float32_matmul_precision("highest")

    def restore() -> None:
        if old != "highest":
            torch.set_float32_matmul_precision(old)
        for matmul, found in kept:
            setattr(matmul, "fp32_precision", found)  # noqa: B010

    return restore


def _pin_reduction(name: str) -> Callable[[], None]:
    """Pin one dtype's sums. Since torch 2.10 a second number says whether a sum may be cut."""
    matmul = torch.backends.cuda.matmul
    allowed, split = getattr(matmul, name), getattr(matmul, f"{name}_split_k", None)
    if not allowed:
        return lambda: None
    setattr(matmul, name, False)
    return lambda: setattr(matmul, name, True if split is None else (True, split))


def allowed_rounding() -> float:
    """Return the rounding that the user allows the model's float32 products: TF32 or bfloat16; 0 without."""
    try:
        allowed = {torch.get_float32_matmul_precision()}
    except RuntimeError:  # the two interfaces differ: the new one tells
        allowed = set()
    for backend in (torch.backends.cuda, torch.backends.mkldnn):
        allowed.add(str(getattr(getattr(backend, "matmul", None), "fp32_precision", "")))
    return 2.0**-7 if allowed & {"medium", "bf16"} else 2.0**-10 if allowed & {"high", "tf32"} else 0.0
