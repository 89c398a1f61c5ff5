"""The machines that this backend runs on: a GPU that its kernels were compiled for, and a compiler of C."""

from __future__ import annotations

import os
import shutil

import torch
from triton import knobs

from ...kernels.common import interpreted

_AMD = ("gfx942", "gfx950")  # compiled for, never run


def why_not(device: torch.device | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Return the reason why this backend cannot run on a device, computing in a dtype; None where it can."""
    if dtype == torch.float64:
        return "its kernels compute in float32 at most"
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if interpreted():
        return None if device.type == "cpu" else "TRITON_INTERPRET is set, with which kernels run on the CPU"
    if device.type != "cuda":
        return f"it needs a GPU that Triton has code for, not {device.type} (TRITON_INTERPRET=1 interprets it, slowly)"
    about = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        arch = about.gcnArchName.split(":")[0]
        if arch not in _AMD:
            return f"its kernels are compiled for {' and '.join(_AMD)}, not for {arch}"
    elif about.major < 8:
        return f"its kernels need a GPU of capability 8.0, and this one's is {about.major}.{about.minor}"
    return _no_compiler()


def _no_compiler() -> str | None:
    """Return the reason why Triton cannot compile the C code that launches a kernel; None where it can.

    It looks in this order (triton/runtime/build.py): a builder of one's own, the variable CC, gcc, clang.
    """
    if getattr(knobs.build, "impl", None) is not None:
        return None
    named = os.environ.get("CC")
    if named is not None:
        return (
            None
            if shutil.which(named)
            else f"Triton needs a C compiler, and the one that CC names, {named!r}, is not there"
        )
    if shutil.which("gcc") or shutil.which("clang"):
        return None
    return "Triton needs a C compiler to launch its kernels; install gcc or clang, or name one in the variable CC"
