"""Stands for the published package, see :mod:`depass_fast.compat`."""

import depass_fast.compat.install  # noqa: F401 (workers and kernels begin here)

from .manager import decomposed_state_manager
from .qwenOmnimanager import qwenOmnimanager

__all__ = ["decomposed_state_manager", "qwenOmnimanager"]
