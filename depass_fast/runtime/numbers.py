"""Numbers that a user gives, checked."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch


def as_index(value: Any, argument: str, expected: str = "an integer") -> int:
    """An integer of any kind (Python's, NumPy's, a 0-dim tensor). Anything else is a TypeError, bool included."""
    try:
        if isinstance(value, (bool, np.bool_)) or getattr(value, "dtype", None) == torch.bool:
            raise TypeError
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{argument}: expected {expected}, got {value!r}.") from None
