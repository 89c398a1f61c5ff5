"""The labels of the two components that the library adds itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass

REST, BIAS = "rest", "bias"
